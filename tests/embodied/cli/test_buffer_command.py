import json
from pathlib import Path

import lerobot_v3
import numpy as np
import pytest

from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.upkeep.contents import Contents
from embodied.buffer.write.writer import ReplayWriter
from embodied.cli.main import main
from embodied.core.episodes import Step

PUSHT = Path(__file__).parents[2] / "data" / "pusht_three_episodes.npz"


def steps(stream, number, length=4, closed=True, **fields):
    for index in range(length + closed):
        final = index == length
        yield Step(
            stream,
            number,
            index,
            {
                "observation.state": np.array([number, index], np.float32),
                "observation.images.top": np.full((8, 8, 3), index, np.uint8),
            },
            np.array([index], np.float32),
            final=final,
            t_ns=index * 100_000_000,
            **({} if final else fields),
        )


@pytest.fixture
def buffer(tmp_path):
    path = tmp_path / "buffer"
    with LocalBuffer(path, codecs={"observation.images.*": "webp"}) as sink:
        for number in range(2):
            for step in steps("r0", number, task="push", success=True, policy_version=number):
                sink.add(step)
        for step in steps("r1", 0, intervention=True, closed=False):
            sink.add(step)
    return path


@pytest.fixture
def command(capsys):
    """Run `embodied buffer …`: (status, what it printed, its error)."""

    def _command(*words):
        status = main(["buffer", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return _command


def test_info_says_what_there_is(command, buffer):
    status, text, _ = command("info", f"path={buffer}")
    assert status == 0
    for said in ("12 steps, 2 complete episodes (2 successful), 1 unfinished", "webp", "8×8×3"):
        assert said in text
    for words in (("info", "--json", f"path={buffer}"), ("info", f"path={buffer}", "--json")):
        status, text, _ = command(*words)
        found = json.loads(text)
        assert status == 0 and found["total"]["steps"] == 12
        assert found["streams"]["r0"] == {
            "episodes": 2,
            "closed": 2,
            "successes": 2,
            "steps": 8,
            "interventions": 0,
            "policy_versions": [0, 1],
        }
        assert found["streams"]["r1"]["interventions"] == 4
        assert found["policy_versions"] == {"-1": 4, "0": 4, "1": 4}
        assert set(found["tasks"]) == {"push", ""}
        features = found["schemas"][0]["features"]
        assert features["observation.images.top"] == {
            "dtype": "uint8",
            "shape": [8, 8, 3],
            "codec": "webp",
        }


def test_info_and_verify_work_on_a_live_buffer(command, buffer):
    with ReplayWriter(buffer) as writer:
        for step in steps("r2", 0):
            writer.append(step)
        assert json.loads(command("info", "--json", f"path={buffer}")[1])["open_segments"] == 1
        status, text, _ = command("verify", f"path={buffer}")
        assert status == 0 and "3 complete episodes of 4, 16 steps: nothing is lost" in text


def test_verify_names_damage_and_says_so_by_its_status(command, buffer):
    segment = next(buffer.glob("*.seg"))
    data = bytearray(segment.read_bytes())
    data[Contents(buffer).episodes["r0", 1].parts[0].offsets[2] + 40] ^= 1
    segment.write_bytes(data)
    status, text, _ = command("verify", f"path={buffer}")
    assert status == 1 and "stream 'r0', episode 1, steps 2" in text and "data are lost" in text
    status, text, _ = command("verify", "--json", f"path={buffer}")
    assert status == 1 and json.loads(text)["findings"][0]["kind"] == "record"


def test_merge_split_and_compact(command, buffer, tmp_path):
    other = tmp_path / "other"
    with LocalBuffer(other) as sink:
        for step in steps("r5", 0):
            sink.add(step)
    words = (f"sources=[{buffer},{other}]", f"to={tmp_path / 'all'}")
    assert "4 episodes, 16 steps" in command("merge", *words)[1]
    assert "0 episodes, 0 steps, 4 were there already" in command("merge", *words)[1]
    target, rest = tmp_path / "push", tmp_path / "rest"
    status, text, _ = command(
        "split", f"path={tmp_path / 'all'}", f"to={target}", f"rest={rest}", "tasks=push"
    )
    assert status == 0 and "2 episodes, 8 steps" in text
    assert {key[0] for key in Contents(rest).episodes} == {"r1", "r5"}
    with ReplayWriter(target) as writer:
        writer.delete("r0", 0)
    assert "1 episodes, 4 steps" in command("compact", f"path={target}")[1]


def test_data_sets_are_imported_by_their_format(command, tmp_path):
    target = tmp_path / "buffer"
    words = ("format=pusht_human", f"path={PUSHT}", f"to={target}")
    assert "imported 2 episodes, 277 steps" in command("import", *words, "limit=2")[1]
    assert "(2 episodes were there already)" in command("import", *words)[1]
    source = lerobot_v3.write(tmp_path / "set", video=True)
    codecs = "codecs={observation.images.*: 'jpeg:90'}"
    words = ("format=lerobot", f"path={source}", f"to={target}", codecs, "final=repeat")
    assert "imported 2 episodes, 8 steps" in command("import", *words)[1]
    contents = Contents(target)
    assert sum(episode.closed for episode in contents.episodes.values()) == 5
    assert "jpeg:90" in {f.codec for s in contents.schemas.values() for f in s.observation}
    copy = ("format=recorded", f"path={target}", f"to={tmp_path / 'copy'}")
    assert "imported 5 episodes" in command("import", *copy)[1]


@pytest.mark.slow
def test_what_is_exported_can_be_imported_again(command, buffer, tmp_path):
    words = ("export", f"path={buffer}", f"to={tmp_path / 'set'}", "images=image", "streams=[r0]")
    status, text, _ = command(*words)
    assert status == 0 and "2 episodes, 10 frames" in text
    words = ("import", "format=lerobot", f"path={tmp_path / 'set'}", f"to={tmp_path / 'back'}")
    assert "imported 2 episodes, 8 steps" in command(*words)[1]
    status, _, error = command("export", f"path={buffer}", f"to={tmp_path / 'set'}")
    assert status == 2 and "already there" in " ".join(error.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("info",), "`path`"),
        (("info", "runs/x"), "path=runs/x"),
        (("info", "path=/nowhere"), "no buffer folder /nowhere"),
        (("verify", "pth=/nowhere"), "Did you mean 'path'"),
        (("compact", "path=/nowhere", "--json"), "--json goes with info and verify"),
        (("compact", "path=/nowhere"), "no buffer folder"),
        (("merge", "sources=[]", "to=x"), "nothing to merge"),
        (("merge", "sources=[a, b", "to=x"), "options cannot be read"),
        (("export", "path=/nowhere", "to=x", "format=zarr"), "zarr"),
        (("import", "to=x"), "`format`"),
        (("import", "to=x", "format=lerobt"), "Did you mean 'lerobot'"),
        (("import", "to=x", "format=lerobot", "path=/nowhere"), "no LeRobot data set"),
        (("import", "to=x", "format=lerobot", "pth=/nowhere"), "Did you mean 'lerobot.path'"),
        (("import", "to=x", "format=robomimic", "path=/nowhere"), "no file /nowhere"),
    ],
)
def test_wrong_words_end_in_one_message(command, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = command(*words)
    assert status == 2 and said in " ".join(error.split())
    assert not list(tmp_path.iterdir())


def test_each_action_has_help(command):
    for action in ("info", "export", "import"):
        status, text, _ = command(action, "--help")
        assert status == 0 and f"embodied buffer {action}" in text and "folder" in text
