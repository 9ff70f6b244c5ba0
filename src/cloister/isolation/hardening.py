"""What a process gives up about itself in any case: being dumped, being read by others of its user, gaining privileges.

Covers: PR_SET_DUMPABLE 0 (no core file; /proc/PID belongs to root; no ptrace by the same user), core limit 0, no new privileges.
Does not cover: root and the kernel.
"""

import resource

from cloister.errors import IsolationError
from cloister.isolation import kernel


def harden(*, dumpable: bool = False) -> None:
    """Makes this process undumpable and unable to gain privileges; inherited by what it starts, but for dumpability.

    `dumpable`: leaves /proc/PID to its user. Only for a process that holds no secret; it writes no core file all the same.

    Raises:
        IsolationError: the kernel refuses.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        kernel.prctl(kernel.PR_SET_DUMPABLE, int(dumpable))
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        found = bool(kernel.prctl(kernel.PR_GET_DUMPABLE))
    except OSError as error:
        raise IsolationError(f"This process cannot be hardened: {error}.", remedy="Use Linux.") from error
    if found and not dumpable:
        raise IsolationError("This process can still be dumped.", remedy="See /proc/sys/fs/suid_dumpable.")
