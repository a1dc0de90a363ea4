"""Every decoder of bytes from elsewhere: it returns what it promises or raises an EmbodiedError."""

from functools import cache
from pathlib import Path

import hostile
import msgspec
import pytest
from decoders import DECODERS, Decoder
from footprint import Footprint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linking import Ask
from ports import PORTS

from embodied.comms.codec import decode
from embodied.comms.framing import pack
from embodied.core.errors import EmbodiedError

MOST_GROWTH_MIB = 64
"""Of this process while a decoder is fed: a bomb of the corpus becomes as much, a lie far more."""


def take(decoder: Decoder, data: bytes) -> None:
    try:
        decoder.decode(data)
    except EmbodiedError as error:
        assert len(str(error)) > 15


@cache
def corpus() -> tuple[bytes, ...]:
    streams = hostile.streams(Path("/nowhere/canary")).values()
    messages = hostile.messages(Ask(1), Path("/nowhere/canary")).values()
    bodies = [b"".join(frames) for frames in messages]
    bodies += [*hostile.deep().values(), *hostile.bombs().values(), *hostile.lying_sizes().values()]
    return (*streams, *bodies, *(pack(1, frames) for frames in messages))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_survives_the_corpus_of_the_ports(name):
    decoder = DECODERS[name]
    assert corpus()
    memory = Footprint()
    for data in corpus():
        take(decoder, data)
        take(decoder, decoder.sample[: len(decoder.sample) // 2] + data[: 1 << 16])
    assert memory.growth_mib < MOST_GROWTH_MIB


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_takes_what_is_damaged_or_made_up(name, data):
    decoder = DECODERS[name]
    made = bytearray(decoder.sample)
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(made)))
        end = data.draw(st.integers(start, min(len(made), start + 8)))
        made[start:end] = data.draw(st.binary(max_size=8))
    take(decoder, bytes(made) or data.draw(st.binary(max_size=64)))
    take(decoder, data.draw(st.binary(max_size=100)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_messages_of_every_port_are_decoded_or_refused(data):
    """Headers of the right shape with wrong values, fields missing and fields too many."""
    port = PORTS[data.draw(st.sampled_from(sorted(n for n, p in PORTS.items() if p.honest)))]
    assert port.honest is not None
    kind = type(port.honest)
    fields = dict(msgspec.to_builtins(port.honest))
    value = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats()
        | st.text(max_size=20)
        | st.binary(max_size=20)
        | st.sampled_from(hostile.PATHS[:12]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=6,
    )
    for name in data.draw(st.lists(st.sampled_from([*fields, "other"]), max_size=3)):
        fields[name] = data.draw(value)
    frame = hostile.MAGIC + msgspec.msgpack.encode([fields, []])
    try:
        header, arrays = decode([frame], kind)
    except EmbodiedError:
        return
    assert type(header) is kind and arrays == {}
