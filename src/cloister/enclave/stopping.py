"""Stop texts: what may still become one is held back, so that no part of a stop text is ever sent."""


class StopDetector:
    """Cuts a stream of text at the first of some stop texts, wherever the pieces are divided.

    The first is the one that is complete first; of several that end together, the longest.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        """`stops`: texts of at least one character."""
        self._stops = stops
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Returns the text that may be sent now, and whether a stop text was met (it and what follows are dropped)."""
        if self._stopped:
            return "", True
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)[1]], True
        keep = max((self._partial(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Returns what is still held back; call it when the answer ended otherwise."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _partial(text: str, stop: str) -> int:
        """Returns the length of the longest end of `text` that begins `stop`."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
