"""Messages about weights that a robot host must refuse, keeping what acts."""

import hashlib

import msgspec
import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from weights import Pair, publish, update_of

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.weights.mirror import WeightMirror
from embodied.weights.store import WeightStore
from embodied.weights.wire import WeightsOffer, WeightsPiece, WeightsRefusedError


def signing():
    key = Ed25519PrivateKey.generate()

    def verify(data, signature):
        try:
            key.public_key().verify(signature, data)
        except InvalidSignature:
            raise WeightsRefusedError("the signature is not the learner's") from None

    return key.sign, verify


def test_every_flipped_byte_of_a_reply_is_refused_and_nothing_adopted(tmp_path):
    sign, verify = signing()
    pair = Pair(tmp_path, sign=sign, verify=verify)
    rng = np.random.default_rng(1)
    pair.learner.publish({"w": rng.normal(size=16).astype(np.float32)}, {})
    pair.sync()
    pair.learner.publish({"w": rng.normal(size=16).astype(np.float32)}, {"x": 1})
    header, arrays = pair.reply()
    for name in arrays:
        for at in range(arrays[name].size):
            damaged = arrays[name].copy()
            damaged[at] ^= 0x10
            with pytest.raises((CorruptDataError, WeightsRefusedError)):
                pair.mirror.take(header, {**arrays, name: damaged}, 0.0)
            assert pair.mirror.version == 1
    for at in range(len(header.signature)):
        forged = bytearray(header.signature)
        forged[at] ^= 1
        with pytest.raises(WeightsRefusedError, match="signature"):
            pair.mirror.take(WeightsOffer(bytes(forged)), arrays, 0.0)
    with pytest.raises(WeightsRefusedError, match="not signed"):
        pair.mirror.take(WeightsOffer(b""), arrays, 0.0)
    assert WeightStore(tmp_path / "robot").versions() == [1]
    assert pair.sync().version == 2
    pair.assert_mirrored(2)


def test_without_signatures_the_digests_still_find_every_flipped_byte(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    pair.sync()
    publish(pair)
    header, arrays = pair.reply()
    piece = arrays["piece"]
    for at in range(0, piece.size, piece.size // 20):
        damaged = piece.copy()
        damaged[at] ^= 0x10
        with pytest.raises(CorruptDataError):
            pair.mirror.take(header, {**arrays, "piece": damaged}, 0.0)
        update = msgspec.structs.replace(
            update_of((header, arrays)), patch_sha256=hashlib.sha256(damaged).hexdigest()
        )
        manifest = np.frombuffer(msgspec.json.encode(update), np.uint8)
        with pytest.raises(CorruptDataError):
            pair.mirror.take(header, {"manifest": manifest, "piece": damaged}, 0.0)
        assert pair.mirror.version == 1
        assert pair.mirror.next_request().base_version is None  # asks for the whole
    assert update_of(pair.reply()).base_version is None
    pair.sync()
    pair.assert_mirrored(2)
    publish(pair)
    assert update_of(pair.reply()).base_version == 2


def test_another_run_an_old_message_and_another_base_are_refused(tmp_path):
    sign, verify = signing()
    pair = Pair(tmp_path / "a", sign=sign, verify=verify)
    other = WeightMirror(WeightStore(tmp_path / "b"), "another run", verify, host="robot")
    publish(pair)
    first = pair.reply()
    with pytest.raises(WeightsRefusedError, match=r"'run'.*'another run'"):
        other.take(*first, 0.0)
    with pytest.raises(ConfigError, match="'another run'"):
        pair.feed.handle(other.next_request(), {})
    pair.sync()
    publish(pair)
    second = pair.reply()
    pair.sync()
    for replayed in (first, second):
        with pytest.raises(WeightsRefusedError, match="acts"):
            pair.mirror.take(*replayed, 0.0)
    publish(pair)
    third = pair.reply()
    stranger = WeightMirror(WeightStore(tmp_path / "c"), "run", verify, host="robot")
    with pytest.raises(WeightsRefusedError, match="asking for the whole"):
        stranger.take(*third, 0.0)
    assert stranger.version is None and not stranger.transferring
    assert pair.mirror.take(*third, 0.0).version == 3


def test_pieces_out_of_order_too_large_empty_or_of_another_patch(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    with pytest.raises(CorruptDataError, match="none is right"):
        pair.mirror.take(WeightsPiece(1, "0" * 64, 0, 1), {"piece": np.zeros(1, np.uint8)}, 0.0)
    pair.talk(max_bytes=100)
    digest = pair.mirror.next_request().patch_sha256
    for header in (
        WeightsPiece(1, digest, 99, 1),
        WeightsPiece(1, digest, 101, 1),
        WeightsPiece(2, digest, 100, 2),
        WeightsPiece(1, "0" * 64, 100, 1),
    ):
        with pytest.raises(CorruptDataError, match="from byte 100 is right"):
            pair.mirror.take(header, {"piece": np.zeros(1, np.uint8)}, 0.0)
    assert pair.mirror.next_request().offset == 100  # nothing of it is lost
    for wrong in ({}, {"piece": np.zeros(3, np.int8)}, {"piece": np.zeros((1, 1), np.uint8)}):
        with pytest.raises(CorruptDataError, match=r"uint8|arrays"):
            pair.mirror.take(WeightsPiece(1, digest, 100, 1), wrong, 0.0)
    for size in (0, 1 << 20):
        pair.talk(max_bytes=100)
        offset = pair.mirror.next_request().offset
        with pytest.raises(CorruptDataError, match=f"piece of {size} bytes"):
            piece = {"piece": np.zeros(size, np.uint8)}
            pair.mirror.take(WeightsPiece(1, digest, offset, 1), piece, 0.0)
        assert not pair.mirror.transferring
    assert pair.sync().version == 1


def test_manifests_that_lie_are_refused_before_memory_is_taken(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    header, arrays = pair.reply()
    update = update_of((header, arrays))
    layout = update.layout
    grown = (msgspec.structs.replace(layout[0], shape=(1 << 29, 4)), *layout[1:])
    replace = msgspec.structs.replace
    lies = [
        replace(update, layout=grown),
        replace(update, layout=grown, num_bytes=sum(spec.num_bytes for spec in grown)),
        replace(update, layout=(*layout, layout[0])),
        replace(update, layout=(replace(layout[0], dtype="float128"), *layout[1:])),
        replace(update, layout=None),
        replace(update, config=None),
        replace(update, base_version=3),
        replace(update, patch_bytes=update.num_bytes * 2 + 4096),
        replace(update, num_bytes=update.num_bytes + 1),
    ]
    texts = [msgspec.json.encode(lie) for lie in lies]
    texts += [b"{" * 100_000, b"[" * 100_000, b"", b"{}", arrays["manifest"].tobytes()[:-1]]
    for text in texts:
        with pytest.raises((CorruptDataError, WeightsRefusedError)):
            manifest = {"manifest": np.frombuffer(text, np.uint8), "piece": arrays["piece"]}
            pair.mirror.take(header, manifest, 0.0)
        assert pair.mirror.version is None and not pair.mirror.transferring
    assert pair.sync().version == 1
