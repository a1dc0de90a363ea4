"""The unified world model, trained where every conditional is known."""

import numpy as np
import pytest
import torch
from scalar_system import (
    CELLS,
    MODES,
    SAMPLED,
    A,
    B,
    K,
    ideal,
    infer,
    losses_at,
    mixture,
    moments,
    scalar,
    system,
    train,
)

SIZES = {
    "depth": 1,
    "width": 64,
    "registers": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
}
FEW_TIMES = {"num_train_steps": 10, "num_steps": 5}
SEEDS = np.arange(3000)

WITHIN = {"policy": 0.2, "next": 0.2, "inverse": 0.25, "forward": 1.0}
"""By which share variances may be off. A slope of the network's that is 5 % too small in the last
step makes that of the forward mode a third greater; after these trainings it is 1.5 to 1.7 times
what it should be. The others are within 0.1, the inverse mode's 0.14."""


def compare(policy, wanted, **within):
    for mode, (mean, variance) in wanted.items():
        sampled = infer(policy, mode, SEEDS)
        assert sampled.mean().item() == pytest.approx(mean, abs=0.04), mode
        share = (WITHIN | within)[mode]
        assert sampled.var().item() == pytest.approx(variance, rel=share), mode


@pytest.fixture(scope="module")
def trained():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    policy = train(scalar(**SIZES), lambda step: system(256, step), 3000, 3e-3)
    torch.set_num_threads(before)
    return policy


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trained_network_is_near_the_floor_at_all_times_and_at_any_two(trained):
    """Where the floor is 0, the network must still say what noise is; its square is 1."""
    floors, held_out = ideal(), system(50_000, 10_000)
    for one in (trained, floors):
        one.seed_training(0)
    with torch.no_grad():
        found, floor = (one.loss(held_out)[0].item() for one in (trained, floors))
    assert 0.998 * floor < found < 1.01 * floor
    for cell in CELLS:
        pairs = zip(*(losses_at(one, cell, held_out) for one in (trained, floors)), strict=True)
        for found, floor in pairs:
            assert 0.99 * floor < found < max(1.05 * floor, 2e-3), cell


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trained_network_has_every_conditional(trained):
    compare(trained, SAMPLED[10])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trained_network_knows_when_it_is_told_noise(trained):
    rng = torch.Generator().manual_seed(1)
    chunk, later = torch.randn(500, 1, 1, generator=rng), torch.randn(500, 1, generator=rng)
    middle, seen = torch.full((500,), 0.5), torch.ones(500, 1)

    def moved(next_time):
        times = middle, torch.full((500,), next_time)
        outs = [
            trained.network.both(chunk, times[0], sign * later, times[1], seen)[0]
            for sign in (1, -1)
        ]
        return (outs[0] - outs[1]).abs().mean().item()

    with torch.no_grad():
        assert moved(trained.form.last) < 0.05 and moved(0.0) > 0.3


@pytest.mark.slow
def test_a_network_that_has_it_left_out_has_every_conditional_too():
    policy = scalar(**SIZES, **FEW_TIMES, left_out=0.3)
    train(policy, lambda step: system(256, step), 1500, 3e-3)
    floors = ideal(**FEW_TIMES)
    compare(policy, {mode: moments(floors, mode) for mode in MODES})


@pytest.mark.slow
@pytest.mark.parametrize(("labelled", "unlabelled"), [(192, 64), (230, 23)])
def test_rows_without_actions_teach_what_follows_but_not_what_to_do(labelled, unlabelled):
    """In those another controller acted, with the gain −K. At the last time of the actions are all
    of them, and a tenth of the others: in the second case as many."""
    policy = scalar(**SIZES, **FEW_TIMES)

    def batches(step):
        own, other = system(labelled, step), system(unlabelled, step + 100_000, gain=-K)
        batch = {key: np.concatenate([own[key], other[key]]) for key in own}
        batch["action_is_pad"] = np.repeat([False, True], [labelled, unlabelled])[:, None]
        return batch

    train(policy, batches, 1500, 3e-3)
    floors = ideal(**FEW_TIMES)
    own = {mode: moments(floors, mode) for mode in MODES if mode != "next"}
    compare(policy, own, inverse=0.4)
    weights = labelled / policy.config.num_train_steps, unlabelled
    both = infer(mixture([A + B * K, A - B * K], weights, **FEW_TIMES), "next", SEEDS)
    compare(policy, {"next": (both.mean().item(), both.var().item())})
