"""Windows that the studies' contenders learn from."""

import numpy as np
import pytest

from benchmarks.cloning import Demonstrations, keep_fixed
from embodied.core.episodes import Step

KEY = "observation.state"


def episode(number, values):
    return [
        Step(
            stream="s",
            episode=number,
            index=i,
            observation={KEY: np.array([v], np.float32)},
            action=np.array([10 * v], np.float32),
            final=i == len(values) - 1,
        )
        for i, v in enumerate(values)
    ]


def demonstrations():
    # The last value of each is the final observation, which has no action.
    return Demonstrations.of([episode(0, [1, 2, 3, 0]), episode(1, [4, 5, 0]), episode(2, [6, 0])])


def test_windows_repeat_the_ends_of_their_own_episode():
    batch = demonstrations().batch(np.array([0, 2, 3]), [KEY], n_obs_steps=2, horizon=3)
    assert batch[KEY][..., 0].tolist() == [[1, 1], [2, 3], [4, 4]]
    assert batch["action"][..., 0].tolist() == [[10, 20, 30], [30, 30, 30], [40, 50, 50]]
    assert batch["action_is_pad"].tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 1]]


def test_a_chunk_may_begin_before_the_step_as_lerobots_does():
    batch = demonstrations().batch(
        np.array([1, 3]), [KEY], n_obs_steps=1, horizon=2, first_action=-1
    )
    assert batch["action"][..., 0].tolist() == [[10, 20], [40, 40]]
    assert batch["action_is_pad"].tolist() == [[0, 0], [1, 0]]


def test_some_of_the_episodes_are_the_same_windows():
    some = demonstrations().only(slice(0, None, 2))
    batch = some.batch(np.arange(4), [KEY], n_obs_steps=2, horizon=2)
    assert batch[KEY][..., 0].tolist() == [[1, 1], [1, 2], [2, 3], [6, 6]]
    assert batch["action"][..., 0].tolist() == [[10, 20], [20, 30], [30, 30], [60, 60]]


def test_statistics_are_of_steps_with_an_action():
    found = demonstrations().statistics()
    assert found[KEY].min == [1.0] and found["action"].max == [60.0]
    assert found["action"].count == 6


def test_a_study_does_not_go_on_with_other_settings(tmp_path):
    path = tmp_path / "study" / "settings.json"
    keep_fixed(path, {"minutes": 20})
    keep_fixed(path, {"minutes": 20})
    with pytest.raises(SystemExit, match="other settings"):
        keep_fixed(path, {"minutes": 30})
