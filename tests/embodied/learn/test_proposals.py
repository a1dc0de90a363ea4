"""What a policy proposed for an observation is used again, and for no other."""

import torch

from embodied.learn.updates.proposals import ProposalCache

STATE = "observation.state"


class Proposer:
    """Proposes the observation, plus how often it has been asked; `asked` keeps for what."""

    def __init__(self):
        self.asked = []

    def __call__(self, observation):
        state_BD = observation[STATE][:, 0]
        self.asked.append(state_BD[:, 0].tolist())
        return (state_BD[:, None, None] + 100 * len(self.asked)).expand(-1, 2, 3, -1)


def observation(*values):
    return {
        STATE: torch.tensor(values)[:, None, None],
        "observation.images.a": torch.ones(len(values), 1, 2),
    }


def test_proposals_are_drawn_once_for_each_observation_until_they_are_old():
    cache, draw = ProposalCache(age=3), Proposer()
    first = cache.of(observation(1.0, 2.0, 1.0), 0, draw)
    assert sorted(draw.asked[0]) == [1.0, 2.0] and first.shape == (3, 2, 3, 1)
    assert first[:, 0, 0, 0].tolist() == [101.0, 102.0, 101.0]
    second = cache.of(observation(2.0, 3.0), 2, draw)
    assert draw.asked[1] == [3.0] and second[:, 1, 2, 0].tolist() == [102.0, 203.0]
    third = cache.of(observation(3.0, 1.0), 3, draw)
    assert draw.asked[2] == [1.0] and third[:, 0, 0, 0].tolist() == [203.0, 301.0]


def test_every_key_of_an_observation_counts():
    cache, draw = ProposalCache(age=3), Proposer()
    seen = observation(1.0)
    cache.of(seen, 0, draw)
    cache.of({**seen, "observation.images.a": torch.zeros(1, 1, 2)}, 0, draw)
    assert draw.asked == [[1.0], [1.0]]


def test_without_an_age_nothing_is_kept():
    cache, draw = ProposalCache(age=0), Proposer()
    for step in range(2):
        cache.of(observation(1.0, 1.0), step, draw)
    assert draw.asked == [[1.0, 1.0], [1.0, 1.0]] and cache.tensors() == {}


def test_what_was_drawn_longest_ago_makes_room():
    cache, draw = ProposalCache(age=100, most_bytes=2 * 2 * 3 * 4), Proposer()
    cache.of(observation(1.0, 2.0), 0, draw)
    found = cache.of(observation(1.0, 3.0), 1, draw)
    assert found[:, 0, 0, 0].tolist() == [101.0, 203.0]
    cache.of(observation(2.0, 3.0), 2, draw)
    cache.of(observation(1.0), 2, draw)
    assert draw.asked == [[1.0, 2.0], [3.0], [1.0]]


def test_what_was_kept_is_there_after_a_restart():
    cache = ProposalCache(age=5)
    cache.of(observation(1.0, 2.0), 4, Proposer())
    again, draw = ProposalCache(age=5), Proposer()
    again.load(cache.tensors(), torch.device("cpu"))
    for step, asked in ((8, []), (9, [[2.0]])):
        again.of(observation(2.0), step, draw)
        assert draw.asked == asked
    again.load({}, torch.device("cpu"))
    assert again.tensors() == {}
