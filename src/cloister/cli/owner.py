"""Where an owner's keys and broker are kept, and how sizes of time are written on the command line."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cloister.errors import SettingsError

SIGNING_KEY = "signing.pem"

BrokerOption = Annotated[
    Path | None,
    typer.Option("--broker", help="Folder of the broker's store; default: the owner's folder of this user."),
]


def now_text() -> str:
    """Returns the time as the broker's log writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def unix_time(text: str) -> float:
    """Returns the Unix time of an ISO date or time; without a zone, UTC.

    Raises:
        SettingsError: it is neither.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise SettingsError(f"{text!r} is not a date.", remedy="Write 2027-01-31 or 2027-01-31T12:00:00Z.") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
