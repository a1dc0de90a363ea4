"""Labels, division, batches, thresholds and scores of success classifiers, in closed form."""

import itertools
import json

import numpy as np
import pytest

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.core.errors import ConfigError
from embodied.core.seeds import make_rng
from embodied.learn.success.labels import (
    HandLabel,
    balanced,
    divide,
    label_episodes,
    read_hand_labels,
)
from embodied.learn.success.scores import (
    Confusion,
    Scored,
    Verdicts,
    choose_threshold,
    confusion,
    ends_at,
    verdicts,
)


def episode(number, length, success):
    """Rows 100 · number + index; the last observation's is the next one."""
    rows = 100 * number + np.arange(length)
    return EpisodeInfo(
        *("arm", number, "task", 0), rows, int(rows[-1]) + 1, True, success, 0, (-1, -1)
    )


def scored(labels, probabilities):
    return Scored(np.array(labels, bool), np.array(probabilities, float))


def test_the_last_observations_of_a_successful_episode_are_positive():
    won, lost = label_episodes([episode(1, 5, True), episode(2, 5, False)], 3, {})
    assert won.rows.tolist() == [100, 101, 102, 103, 104, 105]
    assert won.positive.tolist() == [False, False, False, True, True, True] and won.successful
    assert not lost.positive.any() and len(lost.positive) == 6 and not lost.successful
    (short,) = label_episodes([episode(1, 2, True)], 9, {})
    assert short.positive.tolist() == [False, True, True], "where it begins is no success"


def test_history_repeats_the_first_observation():
    (won,) = label_episodes([episode(1, 3, True)], 1, {})
    assert won.history(1).tolist() == [[100], [101], [102], [103]]
    assert won.history(3)[:2].tolist() == [[100, 100, 100], [100, 100, 101]]
    assert won.history(3)[3].tolist() == [101, 102, 103]


def test_labels_by_hand_take_the_place_of_the_outcome(tmp_path):
    file = tmp_path / "labels.json"
    said = [
        {"stream": "arm", "episode": 1, "successes": [[1, 1], [3, 4]]},
        {"stream": "arm", "episode": 2, "successes": []},
    ]
    file.write_text(json.dumps(said))
    by_hand = read_hand_labels(file)
    episodes = [episode(1, 5, False), episode(2, 5, True), episode(3, 5, True)]
    once, never, as_recorded = label_episodes(episodes, 2, by_hand)
    assert once.positive.tolist() == [False, True, False, True, True, False]
    assert not never.positive.any() and as_recorded.positive.sum() == 2


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (HandLabel("arm", 9, ()), "names episode 9 of stream 'arm'"),
        (HandLabel("leg", 1, ()), "of stream 'leg', which is not there"),
        (HandLabel("arm", 1, ((4, 6),)), "says 4 to 6 .* observations are 0 to 5"),
        (HandLabel("arm", 1, ((4, 3),)), "says 4 to 3"),
        (HandLabel("arm", 1, ((-1, 3),)), "says -1 to 3"),
    ],
)
def test_labels_of_what_is_not_there_are_refused(label, words):
    with pytest.raises(ConfigError, match=words):
        label_episodes([episode(1, 5, True)], 1, {(label.stream, label.episode): label})


@pytest.mark.parametrize("text", [b"", b"{}", b'[{"stream": "arm"}]', b"\xff\xfe", None])
def test_a_file_that_holds_no_labels_says_what_would(text, tmp_path):
    if text is not None:
        (tmp_path / "labels.json").write_bytes(text)
    with pytest.raises(ConfigError, match="does not exist" if text is None else "is right"):
        read_hand_labels(tmp_path / "labels.json")


@pytest.mark.parametrize(("won", "lost"), [(3, 0), (3, 3), (5, 1), (40, 20)])
def test_every_part_has_successes_and_failures_if_there_are_enough(won, lost):
    made = [episode(number, 4, number < won) for number in range(won + lost)]
    episodes = label_episodes(made, 1, {})
    for seed in range(5):
        parts = divide(episodes, (0.2, 0.2), seed)
        assert sorted(e.key for part in parts for e in part) == sorted(e.key for e in episodes)
        for part in parts:
            assert any(e.successful for e in part)
            assert lost < 3 or not all(e.successful for e in part)
    if won == 40:
        assert [len(part) for part in parts] == [36, 12, 12]
        assert parts != divide(episodes, (0.2, 0.2), 0), "by the seed"


def test_two_successes_are_too_few():
    episodes = label_episodes([episode(k, 4, k < 2) for k in range(9)], 1, {})
    with pytest.raises(ConfigError, match="2 successful episodes; at least 3 are needed"):
        divide(episodes, (0.2, 0.2), 0)


def test_batches_are_half_positive_and_see_everything():
    episodes = label_episodes([episode(1, 5, True), episode(2, 9, False)], 2, {})
    batches = balanced(episodes, 2, 9, make_rng(0))
    seen = {False: set(), True: set()}
    for rows, labels in itertools.islice(batches, 100):
        assert rows.shape == (9, 2) and labels.tolist() == [1] * 4 + [0] * 5
        for (_, row), label in zip(rows.tolist(), labels, strict=True):
            seen[bool(label)].add(row)
    assert seen[True] == {104, 105}
    assert seen[False] == {*range(100, 104), *range(200, 210)}


def test_the_threshold_lets_no_more_than_the_bound_through():
    rng = make_rng(0, "threshold")
    for bound in (0.0, 0.004, 0.05, 0.3):
        episodes = [scored([0] * 20, rng.random(20)) for _ in range(25)]
        threshold = choose_threshold(episodes, bound)
        negative = np.concatenate([e.probability for e in episodes])
        assert (negative >= threshold).mean() <= bound
        looser = np.nextafter(threshold, 0)
        assert (negative >= looser).mean() > bound or threshold == 0.5, "the least that does"


def test_a_threshold_is_never_below_one_half_and_not_to_be_had_among_certain_errors():
    assert choose_threshold([scored([0, 0, 1], [0.1, 0.2, 0.3])], 0.0) == 0.5
    with pytest.raises(ConfigError, match="look like success for certain"):
        choose_threshold([scored([0, 0, 1], [0.1, 1.0, 1.0])], 0.0)


def test_confusion_precision_and_recall():
    found = confusion([scored([0, 0, 1, 1], [0.9, 0.1, 0.8, 0.2]), scored([0, 1], [0.5, 0.5])], 0.5)
    assert found == Confusion(2, 2, 1, 1)
    assert (found.precision, found.recall, found.accuracy) == (0.5, 2 / 3, 0.5)
    assert Confusion(0, 0, 0, 5).precision == Confusion(0, 0, 0, 5).recall == 1.0


def test_an_episode_ends_after_patience_in_a_row_the_first_left_out():
    assert ends_at(np.array([1, 1, 0, 1, 1, 1]), 0.5, 2) == 4
    assert ends_at(np.array([1, 1, 0, 1]), 0.5, 1) == 1
    assert ends_at(np.array([1, 1, 0, 1]), 0.5, 2) is None


def test_verdicts_on_episodes():
    episodes = [
        scored([0, 0, 1, 1], [0, 0, 1, 1]),  # in time
        scored([0, 0, 0, 1], [0, 1, 1, 1]),  # early, by 1
        scored([0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 1]),  # early, by 3
        scored([0, 0, 1, 1], [0, 1, 0, 1]),  # never
        scored([0, 0, 0, 0], [1, 1, 0, 1]),  # refused
        scored([0, 0, 0, 0], [0, 1, 1, 0]),  # accepted
    ]
    assert verdicts(episodes, 0.5, 2) == Verdicts(1, 2, 1, 1, 1, 2.0)
