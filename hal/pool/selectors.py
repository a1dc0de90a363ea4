"""What devices a client wants: selectors, their text form, and the choice of distinct devices.

Text form, for command lines: `[count] kind[capability, ...]{label=value, ...}@host`, separated by
commas: "2 arm[camera.wrist], 1 gpu", "so101@bench1", "arm{lab=west}", "id=so101:0".
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar, cast

import msgspec

from embodied.core.errors import ConfigError

MAX_DEVICES = 256
"""Most devices that one request may ask for."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/+-]*")
_KIND = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/+-]*")
_PATTERN = re.compile(r"[A-Za-z_*?][A-Za-z0-9_.:/+*?-]*")
_VALUE = re.compile(r"[^{},=]+")
_RULES = {
    _NAME: "letters, digits and _ . : / + -, beginning with a letter, digit or _",
    _KIND: "letters, digits and _ . : / + -, beginning with a letter or _",
    _PATTERN: "letters, digits and _ . : / + - * ?, not beginning with a digit",
    _VALUE: "printable text without { } , = and without spaces at its ends",
}


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device is, as far as selectors can ask for it. ConfigError if a field is wrong.

    kind: most particular name ("so101"). classes: wider ones ("robot", "arm"). capabilities:
    what it has ("camera.wrist"). labels: anything else that tells it from others (lab: "west").
    """

    id: str
    kind: str
    classes: tuple[str, ...] = ()
    host: str = "localhost"
    capabilities: tuple[str, ...] = ()
    labels: dict[str, str] = {}

    def __post_init__(self) -> None:
        where = f"device '{self.id}'"
        _check(where, self.id, _NAME)
        _check(f"{where}: kind", self.kind, _KIND)
        _check_all(f"{where}: classes", self.classes, _KIND)
        _check(f"{where}: host", self.host, _NAME)
        _check_all(f"{where}: capabilities", self.capabilities, _NAME)
        _check_labels(f"{where}: labels", self.labels)


Row = TypeVar("Row", bound=Description)


class Selector(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` distinct devices, each of which fulfils all that is said here.

    kind: the device's kind or one of its classes, exactly or as a pattern with * and ?.
    capabilities: all of them are needed. labels: the device carries each with that value.
    id: one particular device; count and kind then stay 1 and "*". ConfigError if a field is wrong.
    """

    kind: str = "*"
    count: int = 1
    capabilities: tuple[str, ...] = ()
    host: str | None = None
    labels: dict[str, str] = {}
    id: str | None = None

    def __post_init__(self) -> None:
        _check("selector: kind", self.kind, _PATTERN)
        _check_count(self.count)
        _check_all("selector: capabilities", self.capabilities, _NAME)
        _check_labels("selector: labels", self.labels)
        if self.host is not None:
            _check("selector: host", self.host, _NAME)
        if self.id is not None:
            _check("selector: id", self.id, _NAME)
            if self.count != 1 or self.kind != "*":
                raise ConfigError(
                    f"selector id={self.id} names one device, yet count is {self.count} and kind "
                    f"is '{self.kind}'; leave both out"
                )

    def __str__(self) -> str:
        text = f"{self.count} " if self.count != 1 else ""
        text += self.kind if self.id is None else f"id={self.id}"
        if self.capabilities:
            text += f"[{', '.join(self.capabilities)}]"
        if self.labels:
            text += "{" + ", ".join(f"{key}={value}" for key, value in self.labels.items()) + "}"
        return text if self.host is None else f"{text}@{self.host}"

    def fits(self, row: Description) -> bool:
        """Whether one device fulfils this selector, whatever its state."""
        return (
            (self.id is None or self.id == row.id)
            and (self.host is None or self.host == row.host)
            and (
                self.kind == row.kind
                or self.kind in row.classes
                or any(fnmatchcase(kind, self.kind) for kind in (row.kind, *row.classes))
            )
            and all(name in row.capabilities for name in self.capabilities)
            and all(row.labels.get(key) == value for key, value in self.labels.items())
        )


def text(selectors: Sequence[Selector]) -> str:
    """The text form; `parse` reads it back."""
    return ", ".join(str(selector) for selector in selectors)


def parse(given: str) -> tuple[Selector, ...]:
    """Selectors from their text form; ConfigError names the place and what was expected there."""
    scanner = _Scanner(given)
    found = [_parse_one(scanner)]
    while scanner.take(","):
        found.append(_parse_one(scanner))
    if not scanner.at_end():
        raise scanner.error("expected ',' or the end, or one of [capabilities] {labels} @host")
    return checked(found)


def checked(selectors: str | Sequence[Selector]) -> tuple[Selector, ...]:
    """Selectors as given or parsed; ConfigError if there are none or they ask for too many."""
    if isinstance(selectors, str):
        return parse(selectors)
    total = sum(selector.count for selector in selectors)
    if not 1 <= total <= MAX_DEVICES:
        raise ConfigError(
            f"the selectors ask for {total} devices; ask for 1 to {MAX_DEVICES} at a time"
        )
    return tuple(selectors)


def match(selectors: Sequence[Selector], rows: Sequence[Row]) -> tuple[Row, ...] | None:
    """Distinct devices for all selectors, in their order (count devices each), or None.

    rows: devices in order of preference: of all solutions, the one with the earliest of them.
    """
    found = assign(selectors, rows)
    whole = sum(map(len, found)) == sum(selector.count for selector in selectors)
    return tuple(row for held in found for row in held) if whole else None


def assign(selectors: Sequence[Selector], rows: Sequence[Row]) -> list[list[Row]]:
    """For each selector the devices it gets when as many as possible are placed at once.

    Augmenting paths from the devices' side (Kuhn 1955), earliest device first: one that has been
    placed keeps some place, and the sets that can be placed form a transversal matroid (Edmonds
    and Fulkerson 1965), for which this greedy order finds the most preferred set.
    """
    held: list[list[Row]] = [[] for _ in selectors]

    def place(row: Row, seen: set[int]) -> bool:
        fitting = [k for k, s in enumerate(selectors) if k not in seen and s.fits(row)]
        for k in fitting:
            if len(held[k]) < selectors[k].count:
                held[k].append(row)
                return True
        for k in fitting:
            if k in seen:
                continue
            seen.add(k)
            for n, other in enumerate(held[k]):
                if place(other, seen):
                    held[k][n] = row
                    return True
        return False

    empty = sum(selector.count for selector in selectors)
    for row in rows:
        if not empty:
            break
        empty -= place(row, set())
    return held


def missing(selectors: Sequence[Selector], rows: Sequence[Description]) -> str:
    """Why no choice among `rows` can fulfil the selectors; '' if one can."""
    for selector in selectors:
        fitting = [row.id for row in rows if selector.fits(row)]
        if len(fitting) < selector.count:
            return (
                f"'{selector}' needs {selector.count}, {len(fitting)} fit: {_why(selector, rows)}"
            )
    held = assign(selectors, rows)
    short = next((k for k, s in enumerate(selectors) if len(held[k]) < s.count), None)
    if short is None:
        return ""
    # Hall's theorem: the selectors that alternate with a short one ask for more than fits them.
    tight, frontier = {short}, [short]
    while frontier:
        selector = selectors[frontier.pop()]
        for k, rows_k in enumerate(held):
            if k not in tight and any(selector.fits(row) for row in rows_k):
                tight.add(k)
                frontier.append(k)
    asked = text([selector for k, selector in enumerate(selectors) if k in tight])
    total = sum(selectors[k].count for k in tight)
    ids = [row.id for k in tight for row in held[k]]
    return f"'{asked}' together need {total}, {len(ids)} fit: {listed(ids)}"


def _check(where: str, value: object, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ConfigError(f"{where} is {value!r}; it must be {_RULES[pattern]}")


def _check_all(where: str, values: object, pattern: re.Pattern[str]) -> None:
    if not isinstance(values, tuple):
        raise ConfigError(f"{where} is {values!r}; it must be a tuple of names")
    names = cast("tuple[object, ...]", values)
    for name in names:
        _check(where, name, pattern)
    if len(set(names)) < len(names):
        raise ConfigError(f"{where} is {names!r}; a name stands there twice")


def _check_labels(where: str, labels: object) -> None:
    if not isinstance(labels, dict):
        raise ConfigError(f"{where} is {labels!r}; it must be a dict of names to texts")
    for key, value in cast("dict[object, object]", labels).items():
        _check(f"{where}: key", key, _NAME)
        _check(f"{where}: {key}", value, _VALUE)
        if isinstance(value, str) and (not value.isprintable() or value != value.strip()):
            raise ConfigError(f"{where}: {key} is {value!r}; it must be {_RULES[_VALUE]}")


def _check_count(count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_DEVICES:
        raise ConfigError(f"selector: count is {count!r}; it must be 1 to {MAX_DEVICES}")


class _Scanner:
    """Reads the text form from left to right."""

    def __init__(self, given: str) -> None:
        self.given = given
        self._at = 0

    def _skip(self) -> None:
        while self.given[self._at : self._at + 1].isspace():
            self._at += 1

    def at_end(self) -> bool:
        self._skip()
        return self._at == len(self.given)

    def take(self, token: str) -> bool:
        self._skip()
        if not self.given.startswith(token, self._at):
            return False
        self._at += len(token)
        return True

    def regex(self, pattern: re.Pattern[str]) -> str | None:
        self._skip()
        found = pattern.match(self.given, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def error(self, expected: str) -> ConfigError:
        self._skip()
        rest = self.given[self._at :]
        seen = f"'{rest[:12]}'" if rest else "the end"
        return ConfigError(
            f"selector '{self.given}': {expected}, found {seen} at character {self._at + 1}"
        )


_COUNT = re.compile(r"[0-9]{1,9}(?=\s|$)")
_ID = re.compile(r"id\s*=")


def _parse_one(scanner: _Scanner) -> Selector:
    digits = scanner.regex(_COUNT)
    count = 1 if digits is None else int(digits)
    kind, identity = "*", None
    if scanner.regex(_ID):
        identity = _need(scanner, _NAME, "expected a device's id, such as id=so101:0")
    else:
        kind = _need(scanner, _PATTERN, "expected a kind, such as arm, so10? or * for any")
    capabilities: tuple[str, ...] | None = None
    labels: dict[str, str] | None = None
    host: str | None = None
    while True:
        if capabilities is None and scanner.take("["):
            capabilities = _parse_capabilities(scanner)
        elif labels is None and scanner.take("{"):
            labels = _parse_labels(scanner)
        elif host is None and scanner.take("@"):
            host = _need(scanner, _NAME, "expected a host after '@'")
        else:
            break
    try:
        return Selector(kind, count, capabilities or (), host, labels or {}, identity)
    except ConfigError as error:
        raise ConfigError(f"{error} (in '{scanner.given}')") from error


def _parse_capabilities(scanner: _Scanner) -> tuple[str, ...]:
    found: list[str] = []
    while True:
        found.append(_need(scanner, _NAME, "expected a capability, such as camera.wrist"))
        if scanner.take("]"):
            return tuple(found)
        if not scanner.take(","):
            raise scanner.error("expected ',' or ']' after a capability")


def _parse_labels(scanner: _Scanner) -> dict[str, str]:
    found: dict[str, str] = {}
    while True:
        key = _need(scanner, _NAME, "expected a label, such as lab=west")
        if key in found:
            raise scanner.error(f"label '{key}' stands there twice")
        if not scanner.take("="):
            raise scanner.error(f"expected '=' after label '{key}'")
        found[key] = _need(scanner, _VALUE, f"expected a value for label '{key}'").strip()
        if scanner.take("}"):
            return found
        if not scanner.take(","):
            raise scanner.error(f"expected ',' or '}}' after label '{key}'")


def _need(scanner: _Scanner, pattern: re.Pattern[str], expected: str) -> str:
    found = scanner.regex(pattern)
    if found is None:
        raise scanner.error(expected)
    return found


def _why(selector: Selector, rows: Sequence[Description]) -> str:
    """The first of the selector's demands that leaves too few devices."""
    if not rows:
        return "no device is registered"
    if selector.id is not None and selector.id not in [row.id for row in rows]:
        return f"no device has the id {selector.id}, there are {listed(row.id for row in rows)}"
    left = [row for row in rows if Selector(selector.kind, id=selector.id).fits(row)]
    if len(left) < selector.count:
        kinds = listed(kind for row in rows for kind in (row.kind, *row.classes))
        return f"{len(left)} of kind '{selector.kind}', there are {kinds}"
    for name in selector.capabilities:
        left = [row for row in left if name in row.capabilities]
        if len(left) < selector.count:
            return f"{len(left)} with capability {name}"
    for key, value in selector.labels.items():
        left = [row for row in left if row.labels.get(key) == value]
        if len(left) < selector.count:
            return f"{len(left)} with label {key}={value}"
    return f"{sum(row.host == selector.host for row in left)} on host {selector.host}"


_LISTED = 8


def listed(names: Iterable[str]) -> str:
    """Distinct names in order, the first eight of them."""
    distinct = sorted(set(names))
    more = f" and {len(distinct) - _LISTED} more" if len(distinct) > _LISTED else ""
    return ", ".join(distinct[:_LISTED]) + more
