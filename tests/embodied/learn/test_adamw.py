import subprocess
import sys

import numpy as np
import pytest
import torch

from embodied.core.errors import CorruptDataError
from embodied.learn.adamw import AdamW


def parameters(seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = {"weight": (5, 3), "bias": (3,), "unused": (2,)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=rng)) for n, s in shapes.items()}


def descend(named, step):
    loss = ((named["weight"] + named["bias"]) * (step + 1)).square().sum().sqrt()
    loss.backward()


def test_it_makes_the_steps_of_torchs_own_bit_for_bit():
    ours, theirs = parameters(), parameters()
    mine = AdamW(ours, weight_decay=0.1, betas=(0.8, 0.95))
    reference = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=(0.8, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(7):
        rate = 0.1 / (step + 1)
        reference.param_groups[0]["lr"] = rate
        mine.zero_grad()
        reference.zero_grad()
        descend(ours, step)
        descend(theirs, step)
        mine.step(rate)
        reference.step()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (step, name)


def test_it_goes_on_from_its_arrays_and_parameters_without_gradients_have_none():
    whole, first, second = parameters(), parameters(), parameters()
    optimizers = [AdamW(named, weight_decay=0.0) for named in (whole, first)]
    for step in range(3):
        for named, optimizer in zip((whole, first), optimizers, strict=True):
            optimizer.zero_grad()
            descend(named, step)
            optimizer.step(0.1)
    arrays, steps = optimizers[1].arrays(), optimizers[1].steps()
    assert steps == {"weight": 3.0, "bias": 3.0}
    assert arrays.keys() == {f"{k}/{n}" for k in ("exp_avg", "exp_avg_sq") for n in steps}
    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(first[name])
    resumed = AdamW(second, weight_decay=0.0)
    resumed.load(arrays, steps)
    for named, optimizer in ((whole, optimizers[0]), (second, resumed)):
        optimizer.zero_grad()
        descend(named, 3)
        optimizer.step(0.1)
    for name in whole:
        assert torch.equal(whole[name], second[name])


def test_moments_of_other_parameters_are_refused():
    optimizer = AdamW(parameters(), weight_decay=0.0)
    with pytest.raises(KeyError, match="exp_avg/bias"):
        optimizer.load({}, {"bias": 1.0})
    arrays = {f"{key}/bias": np.zeros(4, np.float32) for key in ("exp_avg", "exp_avg_sq")}
    with pytest.raises(CorruptDataError, match=r"exp_avg of bias has shape \(4,\); \(3,\) is"):
        optimizer.load(arrays, {"bias": 1.0})


def test_a_step_does_not_load_torchs_compiler():
    program = (
        "import sys, torch; from embodied.learn.adamw import AdamW; "
        "p = torch.nn.Parameter(torch.ones(2)); o = AdamW({'p': p}, weight_decay=0.1); "
        "p.sum().backward(); torch.nn.utils.clip_grad_norm_([p], 1.0); o.step(0.1); "
        "o.zero_grad(); raise SystemExit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
