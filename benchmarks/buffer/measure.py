"""Rows of the table, rounds in which contenders take turns, and what of a file is in memory."""

import ctypes
import gc
import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Options:
    """root: where data go, on the disk that is measured. rounds: of contenders taking turns."""

    root: Path
    rounds: int
    quick: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ratio: to what the case says. target: smallest (or, if `at_most`,
    greatest) ratio or value that is good; it is compared with the ratio where there is one."""

    case: str
    contender: str
    value: float | str
    unit: str = ""
    ratio: float | None = None
    target: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def good(self) -> bool | None:
        """Whether the target is met; None without one."""
        found = self.value if self.ratio is None else self.ratio
        if self.target is None or isinstance(found, str):
            return None
        return found <= self.target if self.at_most else found >= self.target

    def as_json(self) -> dict[str, object]:
        """As a JSON object."""
        return asdict(self) | {"good": self.good}


def shown(value: float | str) -> str:
    """Three or more digits, thousands apart."""
    if isinstance(value, str):
        return value
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def markdown(part: str, rows: Iterable[Row]) -> str:
    """The table's lines of one part."""
    lines: list[str] = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        sign = "≤" if row.at_most else "≥"
        verdict = {None: "", True: " ok", False: " **missed**"}[row.good]
        target = "" if row.target is None else f"{sign} {row.target:g}{verdict}"
        value = f"{shown(row.value)} {row.unit}".strip()
        cells = (part, row.case, row.contender, value, ratio, target, row.note)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


HEAD = (
    "| part | case | contender | value | ratio | target | remarks |\n|---|---|---|---|---|---|---|"
)

Rates = dict[str, list[float]]


def rate_of(work: Callable[[], int], seconds: float) -> float:
    """Items a second of work, which returns how many it did; called for so many seconds."""
    done, started_s = 0, time.perf_counter()
    while (taken_s := time.perf_counter() - started_s) < seconds or not done:
        done += work()
    return done / taken_s


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rates:
    """Rates of contenders, each measured once in every round; the order turns round."""
    rates: Rates = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            rates[name].append(contenders[name]())
    return rates


def ratio(rates: Rates, name: str, limit: str) -> float:
    """Median over rounds of a contender's rate in parts of the limit's in the same round."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[limit], strict=True))


def spread(values: Sequence[float]) -> str:
    """Least and greatest in parts of the median."""
    middle = statistics.median(values)
    return f"{min(values) / middle:.2f}–{max(values) / middle:.2f} of the median"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies, of those that occurred."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def load() -> str:
    """How busy the machine is."""
    one, five, _ = os.getloadavg()
    return f"load {one:.2f} (1 min), {five:.2f} (5 min) on {os.cpu_count()} cores"


def machine() -> str:
    """What this is measured on, and how busy it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{os.cpu_count()} × {model}, {memory:.0f} GiB, Linux {platform.release()}; {load()}"


def drop_pages(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, but for pages that a process has mapped."""
    for path in paths:
        keep_only(path, ())


def keep_only(path: Path, stretches: Iterable[tuple[int, int]]) -> None:
    """Drop a file from the page cache but for what is mapped, and for (offset, length).

    These are dropped as well and read again, page by page: the kernel keeps what it has read ahead
    or written in units of many pages, of which it drops only whole ones.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset, length in stretches:
            os.pread(fd, length, offset)
    finally:
        os.close(fd)


def unmap_pages(directory: Path) -> None:
    """Give this process's pages of all mapped files below a directory back (they fault again)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(str(directory)):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def resident_share(paths: Iterable[Path]) -> float:
    """Share of the files' pages that are in the page cache, as mincore says."""
    there = total = 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
            pages = (ctypes.c_ubyte * -(-size // _PAGE))()
            anchor = (ctypes.c_char * size).from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(anchor))
            failed = _LIBC.mincore(address, ctypes.c_size_t(size), pages)
            del anchor
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
            there += sum(page & 1 for page in bytes(pages))
            total += len(pages)
    return there / max(1, total)


def disk_read_bytes() -> int:
    """Bytes that this process has had read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])
