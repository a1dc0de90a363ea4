"""A success classifier learned from recorded episodes, tested on others, and judging a run."""

import subprocess
import sys

import numpy as np
import pytest

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.write.writer import ReplayWriter
from embodied.cli.main import main
from embodied.core.config import compose, convert
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError, SpecError
from embodied.core.frames import Frame
from embodied.core.rundir import RunDir
from embodied.run.config import load_train
from embodied.run.success.training import RewardTrainConfig, evaluate, train
from hal.rewards import make_reward
from policies.success.classifier import restore_classifier
from policies.success.configs import FILE, read_classifier
from sim.pointmass import PointMassDriver

BOUND = 0.01
LEARN = ("positives=1", "patience=1", "steps=600", "learning_rate=0.003")
RECORD = ("task=pointmass", "sim.horizon=22", "demonstrations.noise=0.6")


def collect(path, episodes, seed):
    wanted = (f"demonstrations.episodes={episodes}", f"seed={seed}", f"output={path}")
    assert main(["collect", *RECORD, *wanted]) == 0


def learn(buffer, output, *overrides):
    options = [f"buffer={buffer}", f"output={output}", *LEARN, *overrides]
    return train(convert(compose("reward_train", options), RewardTrainConfig))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Demonstrations under noise, of which about half fail: 60 that succeeded, then 40 others."""
    folder = tmp_path_factory.mktemp("recorded")
    collect(folder / "learned", 60, seed=7)
    collect(folder / "fresh", 40, seed=5)
    return folder


@pytest.fixture(scope="module")
def classifier(recorded, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "success"
    report = learn(recorded / "learned", path, f"false_positives={BOUND}")
    assert report.confusion.accuracy >= 0.97 and report.confusion.recall >= 0.7
    assert sum(report.trained_on) > 2 * sum(report.episodes)
    return path


def test_it_tells_success_in_episodes_that_it_has_never_seen(classifier, recorded):
    report = evaluate(classifier, str(recorded / "fresh"), None, None)
    found, ends = report.confusion, report.verdicts
    successful, failed = report.episodes
    assert successful == 40 and failed >= 20
    assert found.accuracy >= 0.97 and found.recall >= 0.8
    negatives = found.false_positive + found.true_negative
    assert found.false_positive / negatives <= 2 * BOUND
    assert ends.accepted <= 0.1 * failed and ends.missed <= 0.2 * successful


def test_the_same_seed_learns_the_same(recorded, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        learn(recorded / "learned", tmp_path / name, "steps=20", f"seed={seed}")
    (header, first), (same, again), (_, other) = (read_classifier(tmp_path / n) for n in "abc")
    assert header == same
    weight = "network.0.weight"
    np.testing.assert_equal(first, again)
    assert not np.array_equal(first[weight], other[weight])


def test_a_run_judged_by_it_ends_its_episodes_by_it(classifier, tmp_path):
    run = RunDir(tmp_path / "run")
    options = [
        *("task=pointmass", "sim.horizon=40", "run.mode=lockstep", "actors.speed=0"),
        *("actors.count=1", "actors.rows=3", "actors.ticks_per_round=60"),
        *("demonstrations.episodes=6", "demonstrations.noise=0.3", "policy.horizon=4"),
        *("policy.n_action_steps=4", "+policy.network.width=32", "+policy.network.depth=1"),
        *("learner.steps=60", "learner.steps_per_round=20", "learner.publish_every=20"),
        *("evaluation.episodes=0", "evaluation.final_episodes=2", "evaluation.videos=0"),
        *("reward=classifier", f"reward.path={classifier}", "reward.patience=2"),
    ]
    assert main(["train", *options, f"run.dir={run.path}"]) == 0
    header, arrays = read_classifier(classifier)
    network = restore_classifier(header, arrays)
    with ReplayReader(run.buffer) as reader:
        reader.refresh()
        episodes = reader.finished()
        for episode in episodes:
            rows = np.append(episode.rows, episode.final_row)
            seen = reader.gather(tuple(header.spec.observation), rows[:, None])
            sure = network.probabilities(seen) >= header.threshold
            twice = np.flatnonzero(sure[1:-1] & sure[2:]) + 2
            rewards = reader.take("reward", episode.rows)
            if episode.success:
                assert twice.tolist() == [len(rows) - 1], "with the second certain observation"
                assert reader.take("terminated", episode.rows)[-1]
                assert rewards.tolist() == [0.0] * (len(rewards) - 1) + [1.0]
            else:
                assert not twice.size and len(episode.rows) == 40 and not rewards.any()
                assert reader.take("truncated", episode.rows)[-1]
    assert len(episodes) > 6 and sum(e.success for e in episodes) >= 6
    assert run.read("metrics", "evaluation"), "evaluated by the task itself"
    resumed = ["run.resume=true", "reward=null", f"run.dir={run.path}"]
    assert main(["train", *options[:-3], *resumed]) == 2


def test_a_configuration_with_it_is_checked_without_torch(classifier):
    code = (
        "import sys\nfrom embodied.run.config import load_train\n"
        f"load_train(['task=pointmass', 'reward=classifier', 'reward.path={classifier}'])\n"
        "assert 'torch' not in sys.modules"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["task=so101/reach"], SpecError, "reads 'observation.environment_state'"),
        (["reward.path=/nowhere"], ConfigError, "embodied reward train"),
        (["reward.threshold=2"], ConfigError, "reward.threshold"),
    ],
)
def test_a_run_that_cannot_be_judged_is_refused_at_once(classifier, overrides, error, words):
    options = ["task=pointmass", "reward=classifier", f"reward.path={classifier}", *overrides]
    with pytest.raises(error, match=words):
        load_train(options)
    with pytest.raises(ConfigError, match="needs a person"):
        load_train(["task=pointmass", "reward=success_key"])


def test_a_damaged_or_foreign_file_is_refused(classifier, tmp_path):
    data = bytearray((classifier / FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(CorruptDataError, match="digest"):
        read_classifier(tmp_path)


def test_only_the_latest_episode_and_its_history_count(recorded, tmp_path):
    """With a history, the reward's probabilities are those of the recorded windows."""
    learn(recorded / "learned", tmp_path, "steps=50", "classifier.n_obs_steps=3")
    header, arrays = read_classifier(tmp_path)
    network = restore_classifier(header, arrays)
    keys = tuple(header.spec.observation)
    data = {"name": "classifier", "path": str(tmp_path), "patience": 1}
    with ReplayReader(recorded / "fresh") as reader:
        reader.refresh()
        for threshold in (0.3, 0.7):
            reward = make_reward({**data, "threshold": threshold}, PointMassDriver.spec, None)
            for episode in reader.finished()[:6]:
                steps = list(reader.steps(episode))
                frames = [Frame(step.index, step.observation, {}) for step in steps]
                reward.begin(frames[0])
                found = [reward(frame) is True for frame in frames[1:]]
                rows = np.append(episode.rows, episode.final_row)
                at = np.maximum(np.arange(len(rows))[:, None] + [-2, -1, 0], 0)
                wanted = network.probabilities(reader.gather(keys, rows[at])) >= threshold
                assert found == wanted[1:].tolist()


def pictures(path, episodes, side=16):
    """Episodes of 8 steps; in the last three pictures of the successful half a lamp is on."""
    rng = np.random.default_rng(0)
    with ReplayWriter(path) as writer:
        for number in range(episodes):
            won = number % 2 == 0
            for index in range(9):
                seen = rng.integers(0, 60, (side, side, 3), np.uint8)
                if won and index >= 6:
                    seen[2:8, 3:9] = (250, 220, 40)
                elif not won and index >= 6:
                    seen[2:8, 3:9] = (40, 60, 250)
                writer.append(
                    Step(
                        *("arm", number, index, {"observation.images.front": seen}),
                        action=np.zeros(2, np.float32),
                        terminated=index == 7 and won,
                        success=index == 7 and won,
                        final=index == 8,
                    )
                )
        writer.flush()


def test_it_learns_from_pictures(tmp_path):
    pictures(tmp_path / "seen", 16)
    options = [
        *(f"buffer={tmp_path}/seen", f"output={tmp_path}/success", "positives=3"),
        *("steps=80", "batch_size=32", "learning_rate=0.003", "classifier.images.brightness=0"),
    ]
    config = compose("reward_train", options)
    small = {"name": "vit", "patch": 4, "width": 32, "depth": 1, "heads": 2}
    config["classifier"]["images"]["encoder"] = small
    report = train(convert(config, RewardTrainConfig))
    assert report.confusion.accuracy >= 0.97
    assert (report.verdicts.missed, report.verdicts.accepted) == (0, 0)


def test_the_commands_print_confusion_and_refuse_other_recordings(
    classifier, recorded, tmp_path, capsys
):
    assert main(["reward", "test", str(classifier), "--buffer", str(recorded / "fresh")]) == 0
    said = capsys.readouterr().out
    assert "(40 successful," in said and "precision 0." in said and "called success" in said
    pictures(tmp_path / "other", 4)
    assert main(["reward", "test", str(classifier), "--buffer", str(tmp_path / "other")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "reads 'observation.environment_state', which" in said
    trained = ["reward", "train", f"buffer={recorded}/learned", f"output={tmp_path}/mine"]
    assert main([*trained, "steps=5", "positives=2"]) == 0
    said = capsys.readouterr().out
    assert "held out:" in said and "threshold 0." in said and (tmp_path / "mine" / FILE).is_file()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["buffer=/nowhere"], "neither a buffer's folder nor a run's"),
        (["task=pusht"], "holds no finished episode of task 'pusht'"),
        (["observations=[observation.stat]"], "Did you mean 'observation.state'"),
        (["labels=/nowhere"], "does not exist"),
        (["classifier.width=1"], "classifier.width"),
        (["test=0.7"], "test"),
        (["postives=2"], "Did you mean 'positives'"),
    ],
)
def test_wrong_input_ends_in_one_paragraph(overrides, words, recorded, tmp_path, capsys):
    given = [f"buffer={recorded}/learned", f"output={tmp_path}/never", "steps=5", *overrides]
    assert main(["reward", "train", *given]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert words in message and "Traceback" not in message
    assert not (tmp_path / "never").exists()
