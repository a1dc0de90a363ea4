"""How far the memory of a process grows, as the kernel counts it."""

from pathlib import Path


class Footprint:
    """Begins to look when it is made. pid: None for this process."""

    def __init__(self, pid: int | None = None) -> None:
        self._place = Path("/proc") / ("self" if pid is None else str(pid))
        (self._place / "clear_refs").write_text("5")  # sets the peak back
        self._before_kib = self._kib("VmRSS")

    def _kib(self, what: str) -> int:
        return int((self._place / "status").read_text().partition(f"{what}:")[2].split()[0])

    @property
    def growth_mib(self) -> float:
        """From the beginning to the peak since."""
        return (self._kib("VmHWM") - self._before_kib) / 1024
