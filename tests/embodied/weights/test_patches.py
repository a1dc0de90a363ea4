import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import network, stepped

from embodied.comms.codec import DTYPES
from embodied.core.errors import CorruptDataError, SpecError
from embodied.weights import patches
from embodied.weights.acting import (
    acting_form,
    check_layout,
    digest,
    layout_of,
    round_to_bfloat16,
    to_arrays,
)
from embodied.weights.changes import Change, encode_as, encode_change
from embodied.weights.patches import apply_patch, describe, encode_patch, max_patch_bytes
from embodied.weights.planes import expand, fold, squeeze, unfold
from embodied.weights.varints import decode_varints, encode_varints

KINDS = ("gaps", "mask", "dense", "full")


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].spec == b[name].spec
        assert a[name].bits.tobytes() == b[name].bits.tobytes()


def plain_varints(values):
    out = bytearray()
    for value in values:
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


@given(st.lists(st.integers(0, (1 << 35) - 1) | st.integers(0, 300)))
def test_varints_are_leb128(values):
    encoded = encode_varints(np.array(values, np.uint64))
    assert encoded.tobytes() == plain_varints(values)
    assert decode_varints(encoded, len(values)).tolist() == values


@given(st.binary(max_size=12), st.integers(0, 12))
def test_varints_decode_to_what_encodes_to_them_or_not_at_all(data, count):
    try:
        values = decode_varints(np.frombuffer(data, np.uint8), count)
    except CorruptDataError:
        return
    assert values.size == count and plain_varints(values.tolist()) == data


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_folding_is_a_bijection_that_keeps_small_steps_small(dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0, np.iinfo(dtype).max, 1000, dtype=dtype, endpoint=True)
    assert (unfold(fold(values)) == values).all()
    one = np.array([1, np.iinfo(dtype).max], dtype)  # one up, one down
    assert fold(one).tolist() == [2, 1]


def test_rounding_to_bfloat16_is_to_nearest_even_and_keeps_nan():
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    special = [
        0,
        1 << 31,
        0x3F808000,
        0x3F818000,
        0x7F800000,
        0x7F800001,
        0xFFFFFFFF,
        1,
        0x7F7FFFFF,
    ]
    bits = np.concatenate([bits, np.array(special, np.uint32)])
    rounded = round_to_bfloat16(bits)
    with np.errstate(invalid="ignore"):
        value = bits.view(np.float32).astype(np.float64)
        wide = (rounded.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert (np.isnan(value) == np.isnan(wide)).all()
    finite = np.isfinite(value) & (np.abs(value) < 3.3e38)
    even = rounded[finite] % 2 == 0
    for step in (-1, 1):
        other = ((rounded[finite].astype(np.int64) + step) & 0xFFFF).astype(np.uint32) << 16
        with np.errstate(invalid="ignore"):
            distance = np.abs(other.view(np.float32).astype(np.float64) - value[finite])
        mine = np.abs(wide[finite] - value[finite])
        assert (~(distance < mine) & ((distance != mine) | even | (mine == 0))).all()
    assert (round_to_bfloat16(rounded.astype(np.uint32) << 16) == rounded).all()


def test_an_acting_form_of_acting_arrays_is_the_same():
    for precision in ("float32", "bfloat16"):
        form = acting_form(network(), precision)
        arrays = to_arrays(form)
        assert {name: a.dtype for name, a in arrays.items()} == {
            name: a.dtype for name, a in network().items()
        }
        same(acting_form(arrays, precision), form)
        check_layout(layout_of(form), sum(a.bits.nbytes for a in form.values()))


def test_the_digest_tells_names_dtypes_shapes_and_every_bit_apart():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.uint8)}
    variants = [
        base,
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].view(np.int32), "b": base["b"]},
        {"a": base["a"] * -1.0, "b": base["b"]},
        {"a": base["a"]},
        {**base, "empty": np.zeros(0, np.float32)},
    ]
    assert len({digest(acting_form(v, "float32")) for v in variants}) == len(variants)
    assert digest(acting_form(base, "float32")) == digest(
        acting_form(dict(reversed(base.items())), "float32")
    )


def test_arrays_that_cannot_travel_are_refused():
    for array in (np.zeros(2, np.complex64), np.zeros(2, ">f4"), np.array(["a"])):
        with pytest.raises(SpecError, match="dtype"):
            acting_form({"w": array}, "float32")
    with pytest.raises(SpecError, match="name of 1 to 256"):
        acting_form({"": np.zeros(2)}, "float32")


@st.composite
def changes(draw, dtype):
    """Old and new bits of one tensor: any pattern, changed little, much, or by one unit."""
    bits = np.dtype(f"u{dtype.itemsize}")
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    size = draw(st.sampled_from([0, 1, 2, 7, 8, 9, 255, 1000, 20_000]))
    top = 1 if dtype == np.bool_ else np.iinfo(bits).max
    old = rng.integers(0, top, size, dtype=bits, endpoint=True)
    chosen = rng.random(size) < draw(st.sampled_from([0, 1e-3, 0.03, 0.2, 0.6, 0.9, 1]))
    if draw(st.booleans()) or dtype == np.bool_:
        new = rng.integers(0, top, size, dtype=bits, endpoint=True)
    else:
        new = old + rng.choice(np.array([1, top, 2], bits), size)
    return old, np.where(chosen, new, old)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_patches_reconstruct_every_bit(data):
    check_reconstruction(data)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_a_thousand_random_patches_reconstruct_every_bit(data):
    check_reconstruction(data)


def check_reconstruction(data):
    name = data.draw(st.sampled_from(sorted(DTYPES)))
    old, new = data.draw(changes(DTYPES[name]))
    frozen = np.arange(50, dtype=np.float32)
    base = acting_form({"w": old.view(DTYPES[name]), "frozen": frozen}, "float32")
    form = acting_form({"w": new.view(DTYPES[name]), "frozen": frozen}, "float32")
    patch = encode_patch(form, base)
    before = base["w"].bits.tobytes()
    same(apply_patch(patch, layout_of(form), base), form)
    assert base["w"].bits.tobytes() == before
    assert len(patch) <= max_patch_bytes(2, old.nbytes + frozen.nbytes)
    assert [c.index for c in describe(patch)] == ([1] if (old != new).any() else [])
    whole = encode_patch(form, None)
    same(apply_patch(whole, layout_of(form), None), form)
    assert len(whole) <= max_patch_bytes(2, old.nbytes + frozen.nbytes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_the_choice_is_within_a_tenth_of_the_best(data):
    dtype = DTYPES[data.draw(st.sampled_from(["float16", "float32", "int64", "uint8"]))]
    old, new = data.draw(changes(dtype))
    coded = encode_change(0, new, old)
    if coded is None:
        assert (old == new).all()
        return
    sizes = {kind: sum(encode_as(kind, 0, new, old)[0].sizes) for kind in KINDS}
    assert sum(coded[0].sizes) <= 1.1 * min(sizes.values()) + 16


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_run_is_followed_bit_for_bit(precision):
    rng = np.random.default_rng(5)
    arrays = network(1)
    special = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
    held = acting_form(arrays, precision)
    kinds = set()
    for step in range(200):
        arrays = stepped(arrays, rng, share=rng.choice([0.01, 0.3, 1.0]), scale=10.0 ** -(step % 7))
        arrays["net.bias"][:5] = rng.permutation(special).view(np.float32)
        arrays["steps"] = np.array(step)
        form = acting_form(arrays, precision)
        patch = encode_patch(form, held)
        kinds |= {change.kind for change in describe(patch)}
        held = apply_patch(patch, layout_of(held), held)
        same(held, form)
    assert {"gaps", "mask"} < kinds


def test_what_did_not_change_takes_no_byte():
    arrays = network()
    base = acting_form(arrays, "bfloat16")
    assert len(encode_patch(base, base)) < 16
    arrays["frozen"] = np.ones((3000, 1000), np.float32)
    base = acting_form(arrays, "bfloat16")
    arrays["net.bias"] = arrays["net.bias"] + 1
    assert len(encode_patch(acting_form(arrays, "bfloat16"), base)) < 80


def test_few_changes_that_a_sample_misses_are_coded_as_few():
    old = np.random.default_rng(0).integers(0, 1 << 16, 20_000, dtype=np.uint16)
    new = old.copy()
    new[1::1000] ^= 0x55
    for base in (old, np.zeros_like(old)):
        target = new if base is old else base ^ (old != new) * np.uint16(7)
        coded = encode_change(0, target, base)
        sizes = {kind: sum(encode_as(kind, 0, target, base)[0].sizes) for kind in KINDS}
        assert coded is not None and sum(coded[0].sizes) <= 1.1 * min(sizes.values()) + 16


def test_a_base_of_another_layout_is_no_base():
    base, new = (
        acting_form({"a": np.zeros(2)}, "float32"),
        acting_form({"b": np.zeros(2)}, "float32"),
    )
    with pytest.raises(ValueError, match="differ in layout"):
        encode_patch(new, base)


def test_a_damaged_patch_is_refused_or_makes_other_bits_of_the_same_layout():
    rng = np.random.default_rng(3)
    base = acting_form(network(1, size=8), "bfloat16")
    form = acting_form(stepped(network(1, size=8), rng, 0.5), "bfloat16")
    before = digest(base)
    for patch, old in ((encode_patch(form, base), base), (encode_patch(form, None), None)):
        refused = 0
        for at in range(len(patch)):
            for bit in (0x01, 0x80):
                damaged = bytearray(patch)
                damaged[at] ^= bit
                try:
                    found = apply_patch(bytes(damaged), layout_of(form), old)
                    assert layout_of(found) == layout_of(form)
                except CorruptDataError:
                    refused += 1
        assert refused and digest(base) == before
        for size in range(len(patch)):
            with pytest.raises(CorruptDataError):
                apply_patch(patch[:size], layout_of(form), old)
        with pytest.raises(CorruptDataError):
            apply_patch(patch + b"\0", layout_of(form), old)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_anything_are_refused(data):
    form = acting_form(network(1, size=8), "bfloat16")
    for patch in (data, patch_of([], data), b"EMBW\x01" + data):
        with pytest.raises(CorruptDataError):
            apply_patch(patch, layout_of(form), None)


def patch_of(listed, blobs=b""):
    description = msgspec.msgpack.encode(patches._Description(tuple(listed)))
    return patches._HEAD.pack(b"EMBW", 1, len(description)) + description + blobs


def test_lying_counts_sizes_and_places_are_refused():
    base = acting_form({"w": np.zeros(100, np.uint16), "x": np.zeros(3, np.uint8)}, "float32")

    def refused(*listed, blobs=b""):
        with pytest.raises(CorruptDataError):
            apply_patch(patch_of(listed, blobs), layout_of(base), base)

    gaps = bytes([3, 4])  # places 3 and 8
    good = Change(0, "gaps", 2, 2, (2, 2, 2))
    found = apply_patch(patch_of([good], gaps + bytes([2, 2, 0, 0])), layout_of(base), base)
    assert np.flatnonzero(found["w"].bits).tolist() == [3, 8] and found["w"].bits[3] == 1
    values = bytes([2, 2, 0, 0])
    refused(Change(0, "gaps", 3, 2, (2, 2, 2)), blobs=gaps + values)
    refused(Change(0, "gaps", 2, 1 << 30, (2, 2, 2)), blobs=gaps + values)
    refused(Change(0, "gaps", 101, 101, (2, 2, 2)), blobs=gaps + values)
    refused(Change(0, "gaps", 2, 2, (2, 2, 1 << 40)), blobs=gaps + values)
    refused(Change(2, "gaps", 2, 2, (2, 2, 2)), blobs=gaps + values)
    refused(good, good, blobs=2 * (gaps + values))
    refused(Change(1, "full", 0, 0, (3,)), Change(0, "full", 0, 0, (100, 100)), blobs=bytes(203))
    refused(Change(0, "full", 1, 0, (100, 100)), blobs=bytes(200))
    refused(Change(0, "gaps", 2, 2, (2, 2)), blobs=gaps + bytes([2, 2]))
    refused(good, blobs=bytes([3, 97]) + values)
    refused(Change(0, "gaps", 2, 6, (6, 2, 2)), blobs=b"\x03\xff\xff\xff\xff\x0f" + values)
    refused(Change(0, "mask", 1, 13, (13, 1, 1)), blobs=bytes(12) + b"\x01" + bytes(2))
    refused(Change(0, "mask", 1, 13, (13, 1, 1)), blobs=bytes(15))


def frame(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


def test_zstd_bombs_are_refused_before_memory_is_taken():
    huge = bytes(64 << 20)
    declared, undeclared = frame(huge), frame(huge, write_content_size=False)
    nested = frame(declared)
    streamed = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            window_log=27, write_content_size=False
        )
    ).compress(huge)
    for bomb in (declared, undeclared, streamed, frame(b"a" * 99) + declared):
        with pytest.raises(CorruptDataError):
            expand(memoryview(bomb), 100_000)
    assert expand(memoryview(nested), len(declared)).tobytes() == declared  # opened once only
    lying = bytearray(frame(b"a" * 1000))
    with pytest.raises(CorruptDataError):
        expand(memoryview(lying), 999)
    with pytest.raises(CorruptDataError):
        expand(memoryview(lying + b"x"), 1000)
    assert expand(memoryview(squeeze(np.zeros(1000, np.uint8))), 1000).sum() == 0
