"""What is sent to ports and decoders by those who mean harm; one corpus for all of them."""

import random
from pathlib import Path

import msgspec
import zstandard

MIB = 1 << 20
DEPTH = 100_000
MAGIC = b"EMB\x01"

PATHS = (
    "../x",
    "..",
    ".",
    "",
    "../../../../tmp/x",
    "/x",
    "/etc/passwd",
    "a/../../x",
    "x\0y",
    "\0",
    "x" * 5000,
    "\u2024\u2024/x",
    "\uff0e\uff0e\uff0fx",
    "..\\x",
    "x\n",
    "%2e%2e%2fx",
    "~root",
    "\ud83d\ude08",
)
"""Names that would lead elsewhere if they became paths as they are."""


def pickled(canary: Path) -> bytes:
    """A pickle whose loading makes the file."""
    return b"cos\nsystem\n(S'touch %s'\ntR." % str(canary).encode()


def bombs(size: int = 64 * MIB) -> dict[str, bytes]:
    """Few bytes that become many: size declared, not declared, and a bomb within a bomb."""
    declared = zstandard.ZstdCompressor().compress(bytes(size))
    stream = zstandard.ZstdCompressor(write_content_size=False)
    return {
        "declared": declared,
        "undeclared": stream.compress(bytes(size)),
        "nested": zstandard.ZstdCompressor().compress(declared),
        "many frames": declared * 64,
        "declares 2^62 bytes": b"\x28\xb5\x2f\xfd\xe0"
        + (1 << 62).to_bytes(8, "little")
        + b"\0" * 9,
    }


def noise(count: int = 12, seed: int = 0) -> list[bytes]:
    """Random bytes of several sizes."""
    rng = random.Random(seed)
    return [rng.randbytes(rng.choice((1, 7, 8, 16, 100, 4096))) for _ in range(count)]


def deep() -> dict[str, bytes]:
    """Nested a hundred thousand times, in msgpack and JSON."""
    return {
        "arrays": b"\x91" * DEPTH + b"\x90",
        "maps": b"\x81\xa1a" * DEPTH + b"\x80",
        "JSON arrays": b"[" * DEPTH + b"]" * DEPTH,
        "JSON maps": b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
    }


def lying_sizes() -> dict[str, bytes]:
    """msgpack that announces 4 GiB and brings nothing."""
    heads = {"array": b"\xdd", "map": b"\xdf", "bytes": b"\xc6", "text": b"\xdb", "ext": b"\xc9"}
    return {name: head + b"\xff\xff\xff\xff" for name, head in heads.items()}


def messages(header: msgspec.Struct, canary: Path) -> dict[str, list[bytes]]:
    """Name → frames of the codec that no honest end sends; header: one that the port takes."""
    pack = msgspec.msgpack.encode
    good = pack(header)
    deepest = deep()

    def entry(shape, dtype="float32", name="x"):
        return [name, dtype, shape]

    def envelope(*arrays):
        return MAGIC + b"\x92" + good + pack(list(arrays))

    pickle = pickled(canary)
    found = {
        "pickle": [pickle],
        "pickle behind the magic": [MAGIC + pickle],
        "pickle as header": [MAGIC + pack([pickle, []])],
        "pickled objects": [envelope(entry([1], "object")), pickle],
        "pickled objects by letter": [envelope(entry([1], "|O")), pickle],
        "nothing": [b""],
        "magic alone": [MAGIC],
        "another version": [b"EMB\x02" + envelope()[4:]],
        "header of 2 MiB": [MAGIC + b"\x92" + good + b"\x90" + bytes(2 * MIB)],
        "something behind": [envelope() + b"\0"],
        "unknown message": [MAGIC + pack([{"type": "drop table"}, []])],
        "unknown field": [
            MAGIC + b"\x92" + pack({**msgspec.to_builtins(header), "x": 1}) + b"\x90"
        ],
        "text for a header": [MAGIC + pack(["x" * 1000, []])],
        "sides that overflow": [envelope(entry([1 << 30] * 8)), b"x"],
        "sides that overflow to 0": [envelope(entry([1 << 16] * 4)), b""],
        "empty, with sides that overflow": [envelope(entry([0] + [1 << 30] * 7)), b""],
        "a negative side": [envelope(entry([-1])), b"xxxx"],
        "a side of 2^64 - 1": [envelope(entry([(1 << 64) - 1])), b"xxxx"],
        "a side that is no number": [envelope(entry([1.5])), b"xxxx"],
        "200 axes": [envelope(entry([1] * 200)), b"xxxx"],
        "shape and size differ": [envelope(entry([3])), bytes(11)],
        "dtype and size differ": [envelope(entry([3], "float64")), bytes(12)],
        "an unknown dtype": [envelope(entry([3], "float32,(2,)i4")), bytes(12)],
        "a bool of 7": [envelope(entry([1], "bool")), b"\x07"],
        "frames that are missing": [envelope(entry([1]), entry([1], name="y")), bytes(4)],
        "frames that are too many": [envelope(), bytes(4)],
        "a name twice": [envelope(entry([1]), entry([1])), bytes(4), bytes(4)],
        "a name of 5000": [envelope(entry([1], name="x" * 5000)), bytes(4)],
        "no name": [envelope(entry([1], name="")), bytes(4)],
        "a name that is no text": [MAGIC + b"\x92" + good + b"\x91\x93\xa2\xff\xfe" + b"\xa1x\x90"],
    }
    found |= {f"noise {n}": [data] for n, data in enumerate(noise())}
    found |= {f"noise {n} as header": [MAGIC + data] for n, data in enumerate(noise(seed=1))}
    found |= {f"bomb, {name}": [data] for name, data in bombs().items()}
    for name, data in (deepest | lying_sizes()).items():
        found[f"deep or lying {name}"] = [MAGIC + data]
        found[f"deep or lying {name} as header"] = [MAGIC + b"\x92" + data + b"\x90"]
        found[f"deep or lying {name} as arrays"] = [MAGIC + b"\x92" + good + data]
    return found


def streams(canary: Path) -> dict[str, bytes]:
    """Name → bytes for the socket itself, below any protocol."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\0" + bytes(31)
    zmtp = greeting + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x02"
    found = {
        "pickle": pickled(canary),
        "zeros": bytes(1 << 16),
        "ones": b"\xff" * (1 << 16),
        "HTTP": b"GET /../../etc/passwd HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n",
        "an endless HTTP header": b"GET / HTTP/1.1\r\nX: " + b"x" * MIB,
        "TLS": b"\x16\x03\x01\xff\xff\x01\x00\xff\xfb\x03\x03" + bytes(64),
        "HTTP/2, a frame of 16 MiB": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
        "ZMTP, a frame of 2^63 bytes": zmtp + b"\x7f" + b"\xff" * 4096,
        "ZMTP, a frame of 1 GiB": zmtp + (1 << 30).to_bytes(8, "big") + b"x",
        "a message of 4 GiB": b"\xff\xff\xff\xff\x01\0\0\0" + bytes(4096),
        "a message of 1 byte": b"\x01\0\0\0\x01\0\0\0" + bytes(8),
        "frames of 4 GiB": b"\x18\0\0\0\x01\0\0\0" + bytes(8) + b"\xff\xff\xff\xff" + bytes(4),
        "2^32 frames": b"\x18\0\0\0\xff\xff\xff\xff" + bytes(16),
    }
    return found | {f"noise {n}": data for n, data in enumerate(noise(seed=2))}
