"""Runs that learn what is seen from recordings whose actions count for nothing."""

import msgspec
import numpy as np
import pytest
import torch

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.run.build import make_sampling, policy_format
from embodied.run.config import load_train
from embodied.run.lockstep import run_lockstep

SMALL = [
    "task=pointmass",
    "policy=uwm",
    "algorithm=bc",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "+policy.width=16",
    "+policy.depth=1",
    "+policy.heads=2",
    "run.mode=lockstep",
    "actors.speed=0",
    "demonstrations.episodes=3",
    "learner.batch_size=32",
    "learner.steps=50",
    "learner.steps_per_round=50",
    "evaluation.episodes=0",
    "evaluation.final_episodes=1",
    "evaluation.videos=0",
    "buffer.segment_mib=1",
]
UVA = [x for x in SMALL if "depth" not in x and x != "policy=uwm"] + ["policy=uva"]


@pytest.fixture(scope="module")
def drift(tmp_path_factory):
    """A buffer of points that drift by themselves, seen by a robot with five joints."""
    path = tmp_path_factory.mktemp("drift")
    with LocalBuffer(path) as buffer:
        for episode in range(3):
            for index in range(31):
                at = np.array([-1 + index / 15, episode / 4], np.float32)
                seen = {"observation.state": at, "observation.environment_state": -at}
                action = np.full(5, 7, np.float32)
                buffer.add(Step("s", episode, index, seen, action, final=index == 30))
    return path


def source(path, *overrides):
    given = [f"+sampling.sources.drift.path={path}", "+sampling.sources.drift.actions=false"]
    return [*given, "+sampling.sources.drift.ratio=1", *overrides]


@pytest.fixture(scope="module")
def run(drift, tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("free") / "run")
    config = load_train([*SMALL, *source(drift)])
    run.acquire()
    run.write_config(config)
    run_lockstep(run, config, lambda role, values: None)
    run.release()
    return run


def test_a_run_learns_from_them_too(run):
    (row,) = run.read("metrics", "learner")
    with ReplayReader(run.buffer) as own:
        own.refresh()
        assert row["windows"] == own.num_steps + 90
    assert row["next_loss"] < 1.9
    assert run.read("metrics", "evaluation")[-1]["episodes"] == 1


@pytest.mark.parametrize("overrides", [SMALL, UVA], ids=["uwm", "uva"])
def test_what_is_learned_of_actions_knows_nothing_of_them(run, drift, overrides):
    config = load_train([*overrides, *source(drift)])
    with ReplayReader(run.buffer) as reader:
        reader.refresh()
        opened = make_sampling(config, reader)
        batch = opened.sampler.sample(32, np.random.default_rng(0))
        statistics = opened.sampler.statistics()
        opened.close()
    free = batch["source"] == 1
    assert free.sum() == 16 and statistics["action"].max[0] <= 1
    policy = policy_format(config).make(statistics)
    if policy.name == "uva":
        policy.config = msgspec.structs.replace(policy.config, modes=("joint",))
    with torch.no_grad():  # a fresh network's outlets are zero, and hide what comes before them
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def gradients(batch, next_weight):
        policy.config = msgspec.structs.replace(policy.config, next_weight=next_weight)
        policy.seed_training(3)
        policy.zero_grad()
        loss, metrics = policy.loss(batch)
        loss.backward()
        found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        return metrics, found

    other = {name: array.copy() for name, array in batch.items()}
    for name in other:
        if "observation" in name or name == "action":
            other[name][free] = np.roll(other[name][free], 1, axis=0)[..., ::-1] / 2
    (metrics, found), (changed, again) = gradients(batch, 0.0), gradients(other, 0.0)
    assert metrics["action_loss"] == changed["action_loss"] > 0
    assert metrics["next_loss"] != changed["next_loss"]
    assert any(gradient.any() for gradient in found.values())
    assert all(torch.equal(gradient, again[name]) for name, gradient in found.items())
    learned, otherwise = gradients(batch, 1.0)[1], gradients(other, 1.0)[1]
    assert not all(torch.equal(gradient, otherwise[name]) for name, gradient in learned.items())


def test_only_what_can_learn_from_them_is_given_such_sources(drift):
    for overrides, match in (
        (["policy=flow"], "learns nothing from steps without actions.*policy=uwm"),
        (["policy=uwm", "+policy.next_weight=0"], "learns nothing from steps without actions"),
        (["policy=uva", "+policy.modes=[policy]"], "learns nothing from steps without actions"),
        (["policy=uwm", "algorithm=parl"], "PARL learns a critic from recorded actions"),
        (
            ["policy=uwm", "sim.cameras=[top]"],
            r"lacks observation\.images\.top.*observations=\[observation\.state, observation\.env",
        ),
    ):
        with pytest.raises(ConfigError, match=match):
            load_train(["task=pointmass", *overrides, *source(drift)])
    for policy in ("uwm", "uva"):
        load_train(["task=pointmass", f"policy={policy}", *source(drift)])
