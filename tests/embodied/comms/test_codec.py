import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.comms import codec
from embodied.comms.codec import DTYPES, decode, encode
from embodied.core.errors import ConfigError, CorruptDataError, SpecError


class Ping(msgspec.Struct, frozen=True, tag="ping", forbid_unknown_fields=True):
    n: int
    words: list[str] = []


class Pong(msgspec.Struct, frozen=True, tag="pong", forbid_unknown_fields=True):
    pass


def as_bytes(frames):
    return [bytes(frame) for frame in frames]


def forge(header, entries, version=codec.PROTOCOL):
    return b"EMB" + bytes([version]) + msgspec.msgpack.encode([header, entries])


PING = {"type": "ping", "n": 1}


@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    fortran=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip_is_exact_and_read_only(dtype, shape, fortran, seed):
    data = np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
    array = np.array(data, order="F") if fortran else data
    header, arrays = decode(as_bytes(encode(Ping(3), {"x": array, "y": array})), (Ping, Pong))
    assert header == Ping(3)
    for name in ("x", "y"):
        assert arrays[name].dtype == data.dtype and arrays[name].shape == data.shape
        assert arrays[name].tobytes() == data.tobytes()
        assert not arrays[name].flags.writeable


def test_contiguous_arrays_are_not_copied():
    array = np.zeros(1000, np.float32)
    frames = encode(Ping(1), {"x": array})
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), array)
    frame = bytes(frames[1])
    _, arrays = decode([frames[0], frame], Ping)
    assert np.shares_memory(arrays["x"], np.frombuffer(frame, np.uint8))


def test_unaligned_frames_become_aligned_arrays():
    frames = encode(Ping(1), {"x": np.arange(5.0)})
    shifted = memoryview(b"_" + bytes(frames[1]))[1:]
    _, arrays = decode([frames[0], shifted], Ping)
    assert arrays["x"].flags.aligned and arrays["x"].tolist() == [0, 1, 2, 3, 4]


def test_only_accepted_types_are_decoded():
    frames = encode(Pong(), {})
    with pytest.raises(CorruptDataError, match="pong"):
        decode(frames, Ping)
    assert decode(frames, Ping | Pong)[0] == Pong()


def test_untagged_or_lenient_types_are_refused():
    class Lenient(msgspec.Struct, tag="lenient"):
        pass

    class Untagged(msgspec.Struct, forbid_unknown_fields=True):
        pass

    for bad in (Lenient, Untagged):
        with pytest.raises(ConfigError, match="tag"):
            decode(encode(Ping(1), {}), (Ping, bad))


def test_another_protocol_version_is_named():
    with pytest.raises(CorruptDataError, match="version 9; this end speaks version 1"):
        decode([forge(PING, [], version=9)], Ping)


@pytest.mark.parametrize(
    ("entries", "frames", "message"),
    [
        ([["x", "float32", [2]]], [b"1234567"], "7 bytes; 8 bytes"),
        ([["x", "float32", [1 << 30] * 8]], [b""], "are right"),
        ([["x", "float32", [1 << 63]]], [b""], "cannot be decoded"),
        ([["x", "float32", [-1]]], [b""], "cannot be decoded"),
        ([["x", "float32", [1] * 9]], [b"1234"], "cannot be decoded"),
        ([["x", "object", [1]]], [b"12345678"], "dtype 'object'"),
        ([["x", ">f4", [1]]], [b"1234"], "dtype '>f4'"),
        ([["x", "bool", [2]]], [b"\x01\x02"], "bytes above 1"),
        ([["x", "int8", [1]], ["x", "int8", [1]]], [b"1", b"1"], "twice"),
        ([["x", "int8", [1]]], [], "lists 1 arrays but brings 0"),
        ([], [b""], "lists 0 arrays but brings 1"),
        ([["", "int8", [1]]], [b"1"], "cannot be decoded"),
        ([["x", "int8", [1], 5]], [b"1"], "cannot be decoded"),
    ],
)
def test_wrong_manifests_are_refused(entries, frames, message):
    with pytest.raises(CorruptDataError, match=message):
        decode([forge(PING, entries), *frames], Ping)


def test_bounds_on_frames_header_and_nesting():
    with pytest.raises(CorruptDataError, match="frames"):
        decode([], Ping)
    with pytest.raises(CorruptDataError, match="frames"):
        decode([forge(PING, [])] + [b""] * 300, Ping)
    with pytest.raises(CorruptDataError, match="message header of"):
        decode([b"EMB\x01" + bytes(codec.MAX_HEADER_BYTES)], Ping)
    for nest in (b"\x91", b"\x81\xa1a"):
        deep = b"EMB\x01\x92" + nest * 100_000
        with pytest.raises(CorruptDataError, match="cannot be decoded"):
            decode([deep], Ping)
    with pytest.raises(CorruptDataError, match="n2"):
        decode([forge(PING | {"n2": 1}, [])], Ping)
    huge_list = b"EMB\x01\x92\x83\xa4type\xa4ping\xa1n\x01\xa5words\xdd\xff\xff\xff\xff"
    with pytest.raises(CorruptDataError):
        decode([huge_list], Ping)


def test_encode_refuses_what_decode_would():
    for array in (np.array([object()]), np.zeros(2, ">f4"), np.zeros(2, complex)):
        with pytest.raises(SpecError, match="dtype"):
            encode(Ping(1), {"x": array})
    with pytest.raises(SpecError, match="300 arrays"):
        encode(Ping(1), {str(i): np.zeros(1) for i in range(300)})
    with pytest.raises(SpecError, match="header"):
        encode(Ping(1, ["a" * codec.MAX_HEADER_BYTES]), {})


@settings(max_examples=300, deadline=None)
@given(
    position=st.integers(0, 10_000),
    value=st.integers(0, 255),
    cut=st.booleans(),
    frame=st.integers(0, 2),
)
def test_mutated_messages_decode_or_raise_corrupt_data(position, value, cut, frame):
    frames = [
        bytearray(f)
        for f in encode(Ping(7, ["ä", "b"]), {"x": np.ones((2, 3)), "y": np.array([True])})
    ]
    where = position % len(frames[frame])
    if cut:
        del frames[frame][where:]
    else:
        frames[frame][where] = value
    with contextlib.suppress(CorruptDataError):
        decode(frames, (Ping, Pong))


@settings(max_examples=300, deadline=None)
@given(frames=st.lists(st.binary(max_size=60), max_size=4), prefixed=st.booleans())
def test_noise_raises_corrupt_data_only(frames, prefixed):
    if prefixed and frames:
        frames[0] = b"EMB\x01" + frames[0]
    with pytest.raises(CorruptDataError):
        decode(frames, (Ping, Pong))
