import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.buffer.steps.records import decode_header, decode_step, encode_step
from embodied.buffer.steps.schema import (
    RESERVED,
    Codecs,
    Feature,
    Schema,
    decode_schema,
    encode_schema,
)
from embodied.comms.codec import DTYPES
from embodied.core.episodes import Step
from embodied.core.errors import CorruptDataError, SpecError

schema_of = Codecs().schema_of


def assert_equal_steps(a, b):
    for name in Step.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if name == "observation":
            assert x.keys() == y.keys()
            pairs = [(x[key], y[key]) for key in x]
        elif name == "action":
            pairs = [(x, y)]
        else:
            assert x == y, name
            continue
        for p, q in pairs:
            assert p.dtype == q.dtype and p.shape == q.shape and p.tobytes() == q.tobytes()


@given(
    arrays=st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda n: n[0] != "." and n not in RESERVED),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    ),
    flags=st.lists(st.booleans(), min_size=6, max_size=6),
    reward=st.floats(allow_nan=False, allow_infinity=False, width=32),
    index=st.integers(0, 1 << 24).filter(lambda i: i < 1 << 24),
    version=st.integers(-1, 1 << 40),
    t_ns=st.integers(-(1 << 63), (1 << 63) - 1),
)
def test_round_trip(arrays, flags, reward, index, version, t_ns):
    rng = np.random.default_rng(0)
    observation = {k: rng.integers(0, 2, shape).astype(t) for k, (t, shape) in arrays.items()}
    step = Step(
        "robot ü", 3, index, observation, np.array([1.5, -2], np.float32), reward,
        *flags[:5], version, "push", 11, flags[5], t_ns,
    )  # fmt: skip
    schema = schema_of(step)
    assert decode_schema(encode_schema(schema)) == schema
    assert_equal_steps(step, decode_step(encode_step(step, schema), schema))


def test_images_stay_uint8_and_order_of_keys_does_not_matter(make_step):
    step = make_step()
    turned = make_step(observation=dict(reversed(step.observation.items())))
    assert schema_of(step) is not None and schema_of(step) == schema_of(turned)
    decoded = decode_step(encode_step(turned, schema_of(step)), schema_of(step))
    assert decoded.observation["observation.images.front"].dtype == np.uint8
    size = len(encode_step(step, schema_of(step)))
    bigger = make_step(observation=step.observation | {"x": np.zeros((100, 100, 3), np.uint8)})
    assert len(encode_step(bigger, schema_of(bigger))) - size == 30_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"observation": {"x": np.array([object()])}}, "dtype 'object'"),
        ({"observation": {"x": np.zeros(2, ">f4")}}, "byte order"),
        ({"observation": {"reward": np.zeros(2)}}, "reserved"),
        ({"observation": {"x": np.zeros(1 << 27, np.uint8)}}, "more than"),
        ({"reward": float("nan")}, "finite"),
        ({"reward": 1e39}, "finite float32"),
        ({"stream": ""}, "cannot be stored"),
        ({"index": -1}, "cannot be stored"),
        ({"task": "x" * 2000}, "cannot be stored"),
    ],
)
def test_steps_that_cannot_be_stored(make_step, fields, message):
    step = make_step(**fields)
    with pytest.raises(SpecError, match=message):
        encode_step(step, schema_of(step))


def test_difference_of_schemas_is_named():
    base = Schema((Feature("a", "float32", (3,)),), Feature("action", "float32", (2,)))
    shape = Schema((Feature("a", "float32", (4,)),), Feature("action", "float32", (2,)))
    keys = Schema((Feature("b", "float32", (3,)),), Feature("action", "float32", (2,)))
    action = Schema((Feature("a", "float32", (3,)),), Feature("action", "float64", (2,)))
    with pytest.raises(SpecError, match=r"a of here is float32 \[4\]; the log has float32 \[3\]"):
        base.check_same_arrays(shape, "here", "the log")
    with pytest.raises(SpecError, match="here lacks a; has also b: the log has observation keys a"):
        base.check_same_arrays(keys, "here", "the log")
    with pytest.raises(SpecError, match="action of here is float64"):
        base.check_same_arrays(action, "here", "the log")


def test_unknown_schemas_are_corrupt():
    good = msgspec.msgpack.decode(encode_schema(Schema((), Feature("action", "int8", (1,)))))
    for bad in (
        [*good, 1],
        [good[0], ["action", "object", [1]]],
        [good[0], ["action", "int8", [1 << 26, 2]]],
        [[["b", "int8", []], ["a", "int8", []]], good[1]],
        [[["a", "int8", []], ["a", "int8", []]], good[1]],
        {},
    ):
        with pytest.raises(CorruptDataError):
            decode_schema(msgspec.msgpack.encode(bad))
    with pytest.raises(CorruptDataError):
        decode_schema(b"\x91" * 100_000)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 500), value=st.integers(0, 255), cut=st.booleans())
def test_mutated_records_decode_or_raise_corrupt_data(at, value, cut):
    step = Step("r", 1, 2, {"x": np.array([True, False]), "y": np.ones(3)}, np.zeros(2))
    schema = schema_of(step)
    payload = encode_step(step, schema)
    at %= len(payload)
    if cut:
        del payload[at:]
        with pytest.raises(CorruptDataError):
            decode_step(payload, schema)
    else:
        payload[at] = value
        with contextlib.suppress(CorruptDataError):
            decode_step(payload, schema)


def test_noise_is_corrupt():
    for noise in (b"", b"\x01", b"\xff" * 100, b"\x04\0\0\0" + b"\x91" * 4, bytes(100)):
        with pytest.raises(CorruptDataError):
            decode_header(noise)
