"""Weights that change, and a learner and a robot host that talk without a link."""

import numpy as np

from embodied.comms.codec import decode, encode
from embodied.weights.acting import acting_form, digest
from embodied.weights.feed import WeightFeed
from embodied.weights.manifests import decode_update
from embodied.weights.mirror import WeightMirror
from embodied.weights.store import WeightStore
from embodied.weights.wire import REPLIES, REQUESTS

CONFIG = {"policy": "flow", "width": 8}


def network(seed=0, size=300):
    """Arrays such as a policy has: large, small, frozen, empty, scalar, of several dtypes."""
    rng = np.random.default_rng(seed)
    return {
        "net.weight": rng.normal(size=(size, 10)).astype(np.float32),
        "net.bias": rng.normal(size=7).astype(np.float32),
        "frozen": np.random.default_rng(99).normal(size=(50, 10)).astype(np.float32),
        "half": rng.normal(size=4).astype(np.float16),
        "steps": np.array(seed, np.int64),
        "mask": rng.random(9) < 0.5,
        "empty": np.zeros((0, 3), np.float32),
    }


def stepped(arrays, rng, share=0.1, scale=1e-4):
    """The arrays after something like a gradient step."""
    new = {name: array.copy() for name, array in arrays.items()}
    for name in ("net.weight", "net.bias"):
        noise = scale * rng.normal(size=new[name].shape) * (rng.random(new[name].shape) < share)
        new[name] += noise.astype(np.float32)
    return new


class Pair:
    """A learner's store with its feed, and a robot host's with its mirror; messages go through
    the codec. talk: one request and its reply."""

    def __init__(self, path, precision="bfloat16", sign=None, verify=None, **feed):
        self.path, self.verify = path, verify
        self.learner = WeightStore(path / "learner")
        self.feed = WeightFeed(self.learner, "run", precision, sign, **feed)
        self.precision = precision
        self.now_s = 0.0
        self.restart()

    def restart(self):
        """A new process on the host."""
        self.mirror = WeightMirror(
            WeightStore(self.path / "robot"), "run", self.verify, host="robot"
        )

    def reply(self, max_bytes=1 << 20):
        """The learner's answer to what the mirror asks now."""
        frames = encode(self.mirror.next_request(max_bytes), {})
        header, arrays = self.feed.handle(*decode(frames, REQUESTS))
        return decode([bytes(frame) for frame in encode(header, arrays)], REPLIES)

    def talk(self, max_bytes=1 << 20):
        return self.mirror.take(*self.reply(max_bytes), self.now_s)

    def sync(self, max_bytes=1 << 20):
        """Until a version is complete."""
        for _ in range(10_000):
            adopted = self.talk(max_bytes)
            if adopted is not None or not self.mirror.transferring:
                return adopted
        raise AssertionError("the transfer does not end")

    def acting(self):
        """(version, arrays) of the host, None before the first."""
        version = self.mirror.version
        return (
            None
            if version is None
            else (version, WeightStore(self.path / "robot").load(version)[0])
        )

    def assert_mirrored(self, version):
        """The host's newest is this version of the learner's, bit for bit in the acting form."""
        found = self.acting()
        assert found is not None and found[0] == version
        wanted = acting_form(self.learner.load(version)[0], self.precision)
        assert digest(acting_form(found[1], self.precision)) == digest(wanted)
        if self.precision == "float32":
            for name, array in self.learner.load(version)[0].items():
                assert found[1][name].tobytes() == array.tobytes()


def publish(pair, count=1, seed=0, **metadata):
    """So many versions, each a step from the one before."""
    rng = np.random.default_rng(seed)
    latest = pair.learner.latest_version()
    arrays = network(seed) if latest is None else pair.learner.load(latest)[0]
    for _ in range(count):
        arrays = stepped(arrays, rng, share=0.3, scale=0.1)
        version = pair.learner.publish(arrays, CONFIG, {"step": seed, **metadata}).version
    return version


def update_of(reply):
    """The manifest of an offer."""
    return decode_update(reply[1]["manifest"].tobytes())
