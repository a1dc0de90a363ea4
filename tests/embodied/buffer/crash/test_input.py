"""Wrong steps: a clear error that names stream, episode and step, and nothing half-written."""

import random
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from aftermath import read
from story import IMAGE, STATE, check_steps, make_step, steps_in_log

from embodied.buffer.serve.service import BufferClient, BufferService
from embodied.buffer.steps.records import decode_step, encode_step
from embodied.buffer.steps.schema import Codecs
from embodied.buffer.write.progress import StepOrderError
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError, SpecError

STREAM, CLOSED, OPEN, NEXT = "robot7", 40, 41, 23
SEGMENT_BYTES = 1 << 16


def good(episode=OPEN, index=NEXT, stream=STREAM, final=False):
    return make_step(stream, episode, index, final, side=12)


def begin(append):
    """A closed episode, and one whose index NEXT comes next."""
    steps = [good(CLOSED, index, final=index == 3) for index in range(4)]
    steps += [good(index=index) for index in range(NEXT)]
    for step in steps:
        append(step)
    return {step.key: step for step in steps}


def changed(name, value):
    step = good()
    return replace(step, observation={**step.observation, name: value})


def without(name):
    step = good()
    return replace(step, observation={k: v for k, v in step.observation.items() if k != name})


def array(values, dtype=np.float32):
    return np.array(values, dtype)


def alone(**observation):
    """The first step of a stream whose schema is not known yet."""
    return replace(good(0, 0, "fresh9"), observation=observation)


WRONG = {
    "missing key": (without(STATE), SpecError, f"lacks {STATE}"),
    "extra key": (changed("observation.new", array([1])), SpecError, "has also observation.new"),
    "shape": (changed(STATE, array([1, 2])), SpecError, r"float32 \[2\].* has float32 \[5\]"),
    "image shape": (changed(IMAGE, np.zeros((12, 12, 1), np.uint8)), SpecError, r"\[12, 12, 1\]"),
    "dtype": (changed(STATE, np.zeros(5)), SpecError, "float64"),
    "image dtype": (changed(IMAGE, np.zeros((12, 12, 3), np.float32)), SpecError, "float32"),
    "object": (changed(STATE, np.array([None] * 5)), SpecError, "object"),
    "byte order": (changed(STATE, np.zeros(5, ">f4")), SpecError, "byte order"),
    "a list": (changed(STATE, [0.0] * 5), SpecError, f"{STATE}.*list"),
    "action a list": (replace(good(), action=[0.0, 1.0]), SpecError, r"action.*list"),
    "nan": (changed(STATE, array([0, 0, np.nan, 0, 0])), SpecError, r"nan at \[2\]"),
    "infinity": (changed(STATE, array([0, 0, 0, 0, -np.inf])), SpecError, r"-inf at \[4\]"),
    "action nan": (replace(good(), action=array([np.nan, 0])), SpecError, "action"),
    "action shape": (replace(good(), action=array([1, 2, 3])), SpecError, r"action of .*\[3\]"),
    "reward nan": (replace(good(), reward=float("nan")), SpecError, "reward nan"),
    "reward infinite": (replace(good(), reward=float("inf")), SpecError, "reward inf"),
    "reward too large": (replace(good(), reward=1e39), SpecError, "float32"),
    "time": (replace(good(), t_ns=1000), StepOrderError, "time goes backwards"),
    "time range": (replace(good(), t_ns=1 << 64), SpecError, "stored"),
    "gap": (good(index=NEXT + 2), StepOrderError, ""),
    "first gap": (good(OPEN + 5, 2), StepOrderError, "index 0 is next|not begin"),
    "negative": (replace(good(), index=-1), SpecError, ">= 0"),
    "reopened": (good(CLOSED, 4), StepOrderError, "closed"),
    "empty stream": (replace(good(), stream=""), SpecError, "stored"),
    "long task": (replace(good(), task="x" * 1025), SpecError, "1024"),
    "policy version": (replace(good(), policy_version=-2), SpecError, ">= -1"),
    "reserved": (alone(reward=array([1])), SpecError, "reserved"),
    "hidden": (alone(**{".episode": array([1])}), SpecError, "reserved"),
    "too large": (alone(big=np.zeros((200, 200, 3), np.uint8)), ConfigError, "segment_bytes"),
    "far too large": (alone(big=np.zeros((5000, 5000, 3), np.uint8)), SpecError, "more than"),
    "too many": (alone(**{f"x{i}": array([i]) for i in range(65)}), SpecError, "64"),
}
CASES = pytest.mark.parametrize("name", WRONG)
CLIENT_CANNOT_KNOW = ("first gap", "too large")


def names_the_step(message, step):
    return all(str(part) in message for part in step.key)


def contents(path):
    return {file.name: file.read_bytes() for file in path.glob("*.seg*")}


@CASES
def test_append(ram_path, name):
    step, error, message = WRONG[name]
    with ReplayWriter(ram_path, SEGMENT_BYTES) as writer:
        known = begin(writer.append)
        writer.flush()
        before, counts, seq = contents(ram_path), writer.counts(), writer.next_seq
        with pytest.raises(error, match=message) as raised:
            writer.append(step)
        assert names_the_step(str(raised.value), step), raised.value
        assert contents(ram_path) == before
        assert (writer.counts(), writer.next_seq) == (counts, seq)
        assert writer.append(good()) == seq
    found, closed = read(ram_path)
    check_steps(found, known | {good().key: good()})
    assert len(found) == len(known) + 1 and closed == {(STREAM, CLOSED)}


@contextmanager
def serving(path, address):
    with BufferService(path, address, SEGMENT_BYTES) as service:
        stop = threading.Event()
        thread = threading.Thread(target=service.serve, args=(stop.is_set, 0.01))
        thread.start()
        try:
            yield service
        finally:
            stop.set()
            thread.join()


@CASES
def test_client(ram_path, name):
    step, error, message = WRONG[name]
    address = f"ipc://{ram_path}/s"
    with serving(ram_path / "log", address), BufferClient(address, STREAM) as client:
        known = begin(client.add)
        client.flush()
        before = contents(ram_path / "log")
        with pytest.raises(error, match=message) as raised:
            client.add(step)
            assert name in CLIENT_CANNOT_KNOW
            client.flush(0.2)
        assert names_the_step(str(raised.value), step), raised.value
        assert contents(ram_path / "log") == before
        if name not in CLIENT_CANNOT_KNOW:
            client.add(good())
            client.flush()
            known[good().key] = good()
    check_steps(read(ram_path / "log")[0], known)
    assert read(ram_path / "log")[0].keys() == known.keys()


SCHEMA = Codecs().schema_of(good())


def test_what_only_a_malicious_client_sends(ram_path):
    payload = bytes(encode_step(good(), SCHEMA))
    state, action = good().observation[STATE].tobytes(), good().action.tobytes()
    nan = array([np.nan]).tobytes()
    bad = {
        "nan": payload.replace(state, state[:8] + nan + state[12:]),
        "action": payload.replace(action, nan + action[4:]),
        "short": payload[:-8],
        "long": payload + bytes(8),
        "nothing": b"",
        "no header": payload[:9],
        "header only": payload[: payload.index(state)],
        "length": b"\xff\xff\xff\x7f" + payload[4:],
        "stream": payload.replace(b"\xa6robot7", b"\xa6\xff\xff\xff\xff\xff\xff"),
    }
    with ReplayWriter(ram_path, SEGMENT_BYTES) as writer:
        begin(writer.append)
        before, counts = contents(ram_path), writer.counts()
        for name, content in bad.items():
            assert content != payload, name
            with pytest.raises((CorruptDataError, SpecError)) as raised:
                writer.append_encoded(memoryview(content), SCHEMA)
            if name in ("nan", "action", "short", "long", "header only"):
                assert names_the_step(str(raised.value), good()), name
            assert contents(ram_path) == before and writer.counts() == counts
        assert writer.append_encoded(memoryview(payload), SCHEMA) is not None


def test_any_bytes_sent_are_stored_as_a_step_or_refused(ram_path, report):
    rng, taken, refused, episode = random.Random(0), {}, 0, 1000
    with ReplayWriter(ram_path, 1 << 20) as writer:
        begin(writer.append)
        size = len(encode_step(good(episode, 0), SCHEMA))
        for at in [*range(140), *rng.sample(range(140, size), 100)]:
            for bits in (1, 0x80, rng.randrange(1, 256)):
                episode += 1
                sent = encode_step(good(episode, 0), SCHEMA)
                sent[at] ^= bits
                offset = writer._log.offset
                try:
                    seq = writer.append_encoded(memoryview(sent), SCHEMA)
                except EmbodiedError:
                    refused += 1
                    seq = None
                assert (writer._log.offset > offset) == (seq is not None)
                if seq is not None:
                    found = decode_step(sent, SCHEMA)
                    taken[found.key] = found
        writer.flush()
        assert writer.counts().damaged == 0
    logged = steps_in_log(ram_path)
    check_steps({key: step for key, step in logged.items() if key in taken}, taken)
    assert logged.keys() >= taken.keys() and read(ram_path)[0].keys() == logged.keys()
    report(f"payloads with a wrong byte: {refused} refused, {len(taken)} taken as other steps")
    assert refused > 40 and len(taken) > 400
