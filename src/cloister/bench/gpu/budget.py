"""Time that is left: a benchmark on a borrowed GPU ends when it was told to, with what it has."""

import time


class Budget:
    """A deadline."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    @property
    def left_seconds(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self._deadline - time.monotonic()

    def has(self, seconds: float) -> bool:
        """Whether that much time is left."""
        return self.left_seconds >= seconds
