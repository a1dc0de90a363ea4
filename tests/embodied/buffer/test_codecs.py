import io
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from embodied.buffer.steps import codecs
from embodied.core.errors import CorruptDataError, SpecError

IMAGE_CODECS = ("webp", "webp:80", "jpeg:90")


def _photo(shape, seed=0):
    """A smooth image with a little noise: lossy codecs come near it."""
    height, width, channels = shape
    ramp = np.linspace(40, 200, height)[:, None, None] + np.linspace(0, 40, width)[None, :, None]
    noise = np.random.default_rng(seed).normal(0, 2, (height, width, 1))
    return (ramp + noise + 4 * np.arange(channels)).clip(0, 255).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(("uint8", "int64", "float32", "float16", "bool")).flatmap(
        lambda name: arrays(name, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
    ),
    st.sampled_from(("raw", "zstd")),
)
def test_lossless_codecs_give_back_every_bit(array, codec):
    decoded = codecs.decode(codecs.encode(array, codec), codec, array.dtype, array.shape)
    assert decoded.dtype == array.dtype and decoded.shape == array.shape
    assert decoded.tobytes() == array.tobytes()


@pytest.mark.parametrize("shape", [(1, 1, 3), (33, 17, 3), (84, 84, 3), (20, 31, 1)])
def test_webp_is_lossless(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    decoded = codecs.decode(codecs.encode(image, "webp"), "webp", "uint8", shape)
    np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize("codec", ["webp:80", "webp:100", "jpeg:90", "jpeg:100"])
@pytest.mark.parametrize("shape", [(33, 17, 3), (84, 84, 3), (20, 31, 1)])
def test_lossy_codecs_come_near(codec, shape):
    image = _photo(shape)
    data = codecs.encode(image, codec)
    decoded = codecs.decode(data, codec, "uint8", shape)
    assert decoded.shape == shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - image).mean() < 4
    assert bytes(data) == bytes(codecs.encode(image.copy(), codec))


def test_views_that_are_not_contiguous_are_encoded_as_their_values():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    for view in (image[::2, ::-1], image.transpose(1, 0, 2), image[..., ::-1], image[..., 1:2]):
        for codec in ("raw", "zstd", "webp"):
            data = codecs.encode(view, codec)
            np.testing.assert_array_equal(codecs.decode(data, codec, "uint8", view.shape), view)


@pytest.mark.parametrize("codec", ["lz4", "jpeg", "jpeg:0", "jpeg:101", "webp:", "webp:050", ""])
def test_unknown_codecs_list_the_known_ones(codec):
    with pytest.raises(SpecError, match=r"zstd, webp, webp:Q and jpeg:Q"):
        codecs.check(codec, "uint8", (8, 8, 3))


@pytest.mark.parametrize("codec", IMAGE_CODECS)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", (8, 8, 3)),
        ("uint8", (8, 8)),
        ("uint8", (8, 8, 4)),
        ("uint8", (0, 8, 3)),
        ("uint8", (70000, 1, 3)),
    ],
)
def test_image_codecs_take_images_only(codec, dtype, shape):
    with pytest.raises(SpecError, match=r"stores uint8 images \[h, w, 3\] or \[h, w, 1\]"):
        codecs.check(codec, dtype, shape)
    with pytest.raises(SpecError):
        codecs.decode(b"", codec, dtype, shape)


def test_zstd_takes_no_objects():
    with pytest.raises(SpecError, match="dtype object"):
        codecs.check("zstd", np.dtype(object), (2,))


@pytest.mark.parametrize("codec", ["raw", "zstd", *IMAGE_CODECS])
def test_every_truncation_and_every_extension_is_noticed(codec):
    image = _photo((12, 10, 3))
    data = bytes(codecs.encode(image, codec))
    for end in range(len(data)):
        with pytest.raises(CorruptDataError, match="codec '"):
            codecs.decode(data[:end], codec, "uint8", image.shape)
    with pytest.raises(CorruptDataError):
        codecs.decode(data + b"x", codec, "uint8", image.shape)


@pytest.mark.parametrize("codec", ["raw", "zstd", *IMAGE_CODECS])
def test_another_shape_than_the_declared_one_is_noticed(codec):
    data = codecs.encode(_photo((12, 10, 3)), codec)
    grey = () if codec == "webp:80" else ((12, 10, 1),)  # lossy WebP does not tell grey from dull
    for shape in ((12, 11, 3), (10, 12, 1), *grey):
        with pytest.raises(CorruptDataError):
            codecs.decode(data, codec, "uint8", shape)


@pytest.mark.parametrize("codec", ["zstd", *IMAGE_CODECS])
@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8))
def test_damaged_bytes_decode_to_the_declared_array_or_fail_clearly(codec, edits):
    image = _photo((16, 16, 3))
    data = bytearray(codecs.encode(image, codec))
    for place, value in edits:
        data[place % len(data)] = value
    try:
        decoded = codecs.decode(data, codec, "uint8", image.shape)
    except CorruptDataError:
        return
    assert decoded.shape == image.shape and decoded.dtype == np.uint8


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(("zstd", *IMAGE_CODECS)))
def test_arbitrary_bytes_are_refused(data, codec):
    with pytest.raises(CorruptDataError):
        codecs.decode(data, codec, "uint8", (16, 16, 3))


def _saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def test_only_the_plain_forms_of_the_formats_are_accepted():
    image = Image.fromarray(_photo((16, 16, 3)))
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    foreign = {
        "jpeg:90": [
            _saved(image, format="PNG"),
            _saved(image, format="JPEG", progressive=True),
            _saved(image.convert("CMYK"), format="JPEG"),
            _saved(image.convert("L"), format="JPEG"),
        ],
        "webp": [
            _saved(image.convert("RGBA"), format="WEBP", lossless=True, exif=b"Exif\0\0owner"),
            _saved(frames[0], format="WEBP", save_all=True, append_images=frames[1:]),
            _saved(image, format="GIF"),
        ],
    }
    for codec, files in foreign.items():
        for data in files:
            with pytest.raises(CorruptDataError):
                codecs.decode(data, codec, "uint8", (16, 16, 3))


@pytest.mark.parametrize("codec", ["zstd", "webp", "jpeg:50"])
def test_bombs_take_no_memory(codec):
    """A few bytes that would unpack to hundreds of megabytes are refused by what they declare."""
    import resource

    if codec == "zstd":
        bomb = codecs.encode(np.zeros(1 << 28, np.uint8), codec)
    else:
        bomb = codecs.encode(np.zeros((12000, 12000, 1), np.uint8), codec)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with pytest.raises(CorruptDataError, match="declares"):
        codecs.decode(bomb, codec, "uint8", (16, 16, 3))
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert pages < 10_000  # 40 MB; the smallest bomb unpacks to 144 MB


def test_threads_have_codecs_of_their_own():
    image = _photo((64, 64, 3))
    done = []

    def work(codec):
        for _ in range(50):
            decoded = codecs.decode(codecs.encode(image, codec), codec, "uint8", image.shape)
            assert np.array_equal(decoded, image)
        done.append(codec)

    threads = [threading.Thread(target=work, args=(codec,)) for codec in ("zstd", "zstd", "webp")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == ["webp", "zstd", "zstd"]
