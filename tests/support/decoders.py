"""Every decoder of the product: how it is called and what it takes, or who sees to it."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import safetensors.numpy
from linking import Ask
from spooling import make_step
from uploads import changed, upload

from embodied.buffer.interchange import lerobot
from embodied.buffer.spool.messages import unwrap
from embodied.buffer.steps import codecs, records, schema
from embodied.comms.codec import decode, encode
from embodied.comms.framing import Stream, pack, unpack
from embodied.comms.identity.peer import peer_of
from embodied.comms.links import wire
from embodied.core.specs import ArraySpec, PolicySpec
from embodied.learn.success.labels import read_hand_labels
from embodied.run.site import host
from embodied.run.site import messages as site
from embodied.weights import acting, manifests, patches, planes
from policies.lerobot import export
from policies.success import configs as success

_SCHEMA = schema.Codecs({}).schema_of(make_step(0, 0, 9))
_PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
_UPLOAD, _ARRAYS = upload(make_step(0, 0, 9))
_FORM = acting.acting_form({"w": np.arange(8, dtype=np.float32)}, "float32")
_PROCESSOR = (
    b'{"steps": [{"registry_name": "unnormalizer_processor", "config": {"features": {"action":'
    b' {"type": "ACTION"}}, "norm_map": {"ACTION": "MIN_MAX"}}, "state_file":'
    b' "statistics.safetensors"}]}'
)
_STATISTICS = safetensors.numpy.save({"action.min": np.zeros(2, np.float32)})
_MANIFEST = manifests.WeightManifest(1, "0" * 64, 8, None, {}, {})
_CLASSIFIER = success.StoredClassifier(
    format=success.FORMAT,
    spec=PolicySpec({"observation.state": ArraySpec((2,))}, ArraySpec((1,)), 1, 1, 1),
    options=success.SuccessConfig(),
    threshold=0.5,
    patience=3,
    positives=5,
)
_UPDATE = manifests.UpdateManifest(
    *("run", 2, None, None, acting.digest(_FORM), 32, "float32", "0" * 64, 9),
    *(acting.layout_of(_FORM), {}, {}),
)


@dataclass(frozen=True)
class Decoder:
    """module: where it is. sample: bytes that it takes."""

    module: str
    decode: Callable[[bytes], object]
    sample: bytes = field(repr=False)


def streamed(data: bytes) -> list[bytes]:
    stream = Stream(1 << 20)
    stream.feed(data)
    return list(stream.messages())


def uploaded(data: bytes):
    arrays = {**_ARRAYS, "payloads": np.frombuffer(data, np.uint8)}
    return unwrap(changed(_UPLOAD, zstd=True), arrays)


def in_file(read: Callable[[Path], object], data: bytes):
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return read(Path(file.name))


def exported(file: str, data: bytes):
    """An export of LeRobot's whose `file` holds the data."""
    files = {
        "config.json": b'{"type": "act"}',
        "policy_preprocessor.json": b'{"steps": []}',
        "policy_postprocessor.json": _PROCESSOR,
        "statistics.safetensors": _STATISTICS,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**files, file: data}.items():
            (Path(folder) / name).write_bytes(content)
        found = export.read_export(Path(folder))
        found.features("input_features")
        return found, export.read_statistics(Path(folder))


def assigned(data: bytes):
    return host._config_of(site.Assignment("0" * 32, "run", data))


def images(codec: str) -> Decoder:
    return Decoder(
        "embodied/buffer/steps/codecs.py",
        lambda data: codecs.decode(data, codec, np.uint8, (4, 4, 3)),
        bytes(codecs.encode(_PIXELS, codec)),
    )


DECODERS = {
    "piece of a link": Decoder(
        "embodied/comms/links/wire.py", wire.parse, wire.part_piece(1, 1, 0, 4, [b"data"])
    ),
    "greeting": Decoder(
        "embodied/comms/links/wire.py",
        wire.parse_hello,
        wire.hello_piece(wire.Hello("host", "run", "1")),
    ),
    "welcome": Decoder(
        "embodied/comms/links/wire.py", wire.parse_welcome, wire.welcome_piece("1", "no")
    ),
    "message": Decoder(
        "embodied/comms/codec.py",
        lambda data: decode(unpack(data)[1], Ask),
        pack(1, encode(Ask(1), {"x": np.zeros(3)})),
    ),
    "stream": Decoder("embodied/comms/codec.py", streamed, pack(1, encode(Ask(1), {}))),
    "certificate": Decoder("embodied/comms/identity/keyfiles.py", peer_of, b"-----BEGIN CER"),
    "upload": Decoder("embodied/buffer/spool/messages.py", uploaded, bytes(_ARRAYS["payloads"])),
    "step": Decoder(
        "embodied/buffer/steps/records.py",
        lambda data: records.decode_step(data, _SCHEMA),
        bytes(records.encode_step(make_step(0, 0, 9), _SCHEMA)),
    ),
    "control record": Decoder(
        "embodied/buffer/steps/records.py",
        records.decode_control,
        records.encode_control(records.Control((("s", 1),))),
    ),
    "schema": Decoder(
        "embodied/buffer/steps/schema.py",
        lambda data: schema.layout_of(schema.decode_schema(data)),
        schema.encode_schema(_SCHEMA),
    ),
    **{f"array, {codec}": images(codec) for codec in ("raw", "zstd", "webp", "webp:80", "jpeg:80")},
    "manifest": Decoder(
        "embodied/weights/manifests.py",
        lambda data: manifests.decode_manifest(data, 1, Path("here")),
        manifests.encode_manifest(_MANIFEST),
    ),
    "weights": Decoder(
        "embodied/weights/manifests.py",
        lambda data: manifests.tensors(np.frombuffer(data, np.uint8)),
        manifests.serialise({"w": np.arange(8, dtype=np.float32), "n": np.ones((2, 3), np.int64)}),
    ),
    "update": Decoder(
        "embodied/weights/manifests.py", manifests.decode_update, msgspec.json.encode(_UPDATE)
    ),
    "patch": Decoder(
        "embodied/weights/patches.py",
        lambda data: acting.to_arrays(patches.apply_patch(data, acting.layout_of(_FORM), None)),
        patches.encode_patch(_FORM, None),
    ),
    "planes": Decoder(
        "embodied/weights/planes.py",
        lambda data: planes.expand(memoryview(data), 1000),
        planes.squeeze(np.zeros(1000, np.uint8)),
    ),
    "configuration of a gateway": Decoder("embodied/run/site/host.py", assigned, b'{"task": "x"}'),
    "description of a data set": Decoder(
        "embodied/buffer/interchange/lerobot.py",
        partial(in_file, lambda path: lerobot.read_json(path, lerobot.Info)),
        b'{"codebase_version": "v3.0", "fps": 10, "features": {}, "data_path": "data"}',
    ),
    "labels by hand": Decoder(
        "embodied/learn/success/labels.py",
        partial(in_file, read_hand_labels),
        b'[{"stream": "arm", "episode": 3, "successes": [[40, 52]]}]',
    ),
    "success classifier": Decoder(
        "policies/success/configs.py", success.decode_header, msgspec.json.encode(_CLASSIFIER)
    ),
    **{
        f"{file} of LeRobot": Decoder("policies/lerobot/export.py", partial(exported, file), sample)
        for file, sample in (
            ("config.json", b'{"type": "act", "input_features": {}}'),
            ("policy_postprocessor.json", _PROCESSOR),
            ("statistics.safetensors", _STATISTICS),
        )
    },
}

ELSEWHERE = {
    "embodied/buffer/interchange/robomimic.py": "tests/embodied/buffer/test_robomimic.py",
    "embodied/buffer/interchange/lerobot_tables.py": "tests/embodied/buffer/test_lerobot_import.py",
    "embodied/buffer/steps/blocks.py": "tests/embodied/buffer/crash/test_damage.py",
    "embodied/buffer/steps/chunks.py": "tests/embodied/buffer/crash/test_chunks.py",
    "embodied/comms/identity/authority.py": "tests/embodied/comms/identity/test_authority.py",
    "embodied/comms/identity/signing.py": "tests/embodied/comms/identity/test_peers.py",
    "policies/checkpoint.py": "tests/policies/test_policy_checkpoint.py",
    "policies/folder.py": "tests/policies/test_policy_checkpoint.py",
}
"""Decoders that are fed with damage by tests of their own."""

OWN_FILES = {
    *("deploy/rollout.py", "embodied/buffer/upkeep/verification.py", "embodied/run/feedback.py"),
    *("embodied/buffer/write/acknowledged.py", "embodied/core/files.py", "embodied/core/rundir.py"),
    *("embodied/learn/learner.py", "embodied/run/compose.py", "embodied/run/site/config.py"),
    *("embodied/run/site/results.py", "embodied/run/site/status.py", "embodied/weights/trial.py"),
    *("embodied/weights/incoming.py", "hal/drivers/calibration.py", "hal/listing.py"),
    *("hal/pool/tables.py", "hal/process/orphan.py", "hal/process/servo.py"),
    *("hal/process/watchdog.py", "hal/safety/latch.py", "embodied/buffer/load/loader.py"),
    "sim/pusht_demos.py",
}
"""Decoders of what the same user's processes on this host wrote (or whose digest is pinned): who
may write there needs no decoder to do harm."""
