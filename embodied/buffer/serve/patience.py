"""How long to wait for an acknowledgement before what was sent counts as lost."""

_GAIN, _DEVIATION_GAIN, _DEVIATIONS = 1 / 8, 1 / 4, 4
_MOST_S = 60.0


class Patience:
    """Jacobson's estimate (RFC 6298): smoothed time plus four mean deviations, and at least
    least_s; doubled whenever it runs out, until an acknowledgement is measured again.

    Only what was sent once may be measured (Karn's rule): of an acknowledgement that comes after a
    second sending nobody knows which of both it answers.
    """

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._smooth_s: float | None = None
        self._deviation_s = 0.0
        self._backoff = 1.0

    @property
    def timeout_s(self) -> float:
        """How long to wait now."""
        estimate_s = (self._smooth_s or 0.0) + _DEVIATIONS * self._deviation_s
        most_s = max(self._least_s, _MOST_S)
        return min(most_s, self._backoff * max(self._least_s, estimate_s))

    def measured(self, elapsed_s: float) -> None:
        """An acknowledgement of what was sent once came after so long."""
        self._backoff = 1.0
        if self._smooth_s is None:
            self._smooth_s, self._deviation_s = elapsed_s, elapsed_s / 2
            return
        error_s = elapsed_s - self._smooth_s
        self._deviation_s += _DEVIATION_GAIN * (abs(error_s) - self._deviation_s)
        self._smooth_s += _GAIN * error_s

    def ran_out(self) -> None:
        """None came within timeout_s."""
        self._backoff = min(2 * self._backoff, _MOST_S / self._least_s)
