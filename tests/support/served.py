"""Small policies for the point mass, and policy servers as processes of their own."""

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import torch

from embodied.core.processes import die_with_parent
from embodied.core.rundir import RunDir
from embodied.run.config import load_train
from embodied.run.remote.policy import connect
from embodied.run.serving.process import ServeConfig, serve
from embodied.run.serving.server import BatchingConfig
from embodied.weights.store import WeightStore
from policies.acting import InferenceConfig
from policies.build import build_policy
from policies.checkpoint import policy_state, save_policy
from policies.inference.policy import ActingPolicy
from sim.pointmass import PointMassDriver

ROWS = 4
SPEC = PointMassDriver.spec
RANGE = SimpleNamespace(mean=[0.0] * 2, std=[1.0] * 2, min=[-1.0] * 2, max=[1.0] * 2)
SMALL = {"name": "mlp", "width": 32, "depth": 1, "time_dim": 16}


def make_policy(seed=0, name="flow", **options):
    """A policy with random weights everywhere."""
    config = {"horizon": 16, "n_action_steps": 8, "network": SMALL, **options}
    stats = dict.fromkeys(SPEC.observation, RANGE)
    policy = build_policy(name, config, SPEC, list(SPEC.observation), stats, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return policy


def stored(path: Path, seed=0, **options) -> Path:
    """The folder of such a policy."""
    save_policy(path, make_policy(seed, **options))
    return path


def published(path: Path) -> RunDir:
    """A run's directory without weights; `publish` adds versions 1, 2, …"""
    run = RunDir(path)
    run.path.mkdir()
    run.write_config(load_train(["task=pointmass"]))
    return run


def publish(run: RunDir, policy) -> int:
    config, arrays = policy_state(policy)
    return (
        WeightStore(run.weights).publish(arrays, config, {"sitting": 1, "published_ns": 1}).version
    )


def observations(rows, seed):
    rng = np.random.default_rng(seed)
    return {key: rng.uniform(-1, 1, (rows, 2, 2)).astype(np.float32) for key in SPEC.observation}


class Padded:
    """A local policy that decides in batches of as many rows as a server does."""

    def __init__(self, policy, rows=ROWS, **inference):
        self._acting = ActingPolicy(policy, InferenceConfig(**inference), rows=rows)
        self.spec, self._rows = self._acting.spec, rows

    def init(self, batch):
        return self._acting.init(batch)

    def act(self, carry, obs, *, prefix=None, seed):
        rows = len(seed)

        def full(value):
            return np.concatenate([value, *[value[-1:]] * (self._rows - rows)])

        kept, actions = self._acting.act(
            carry and {key: full(value) for key, value in carry.items()},
            {key: full(value) for key, value in obs.items()},
            prefix=None if prefix is None else full(prefix),
            seed=full(seed),
        )
        return kept and {key: value[:rows] for key, value in kept.items()}, actions[:rows]


def _serve(config: ServeConfig, parent: int, slow_s: float) -> None:
    die_with_parent(parent)
    torch.set_num_threads(1)
    with contextlib.suppress(KeyboardInterrupt):
        serve(config, lambda: True, lambda health: time.sleep(slow_s))


class ServerProcess:
    """A server that can be killed and started again. slow_s: it sleeps before each batch."""

    def __init__(
        self,
        folder: Path,
        checkpoint: Path,
        *,
        slow_s=0.0,
        follow=False,
        inference=None,
        **batching,
    ):
        self.address = f"ipc://{folder}/policy.sock"
        defaults = {"rows": ROWS, "max_wait_ms": 3.0, "max_queued": 64}
        self._config = ServeConfig(
            checkpoint=str(checkpoint),
            listen=self.address,
            follow=follow,
            report_s=10.0,
            inference=InferenceConfig(**(inference or {})),
            batching=msgspec.convert(defaults | batching, BatchingConfig),
        )
        self._slow_s = slow_s
        self._process = None
        self.start()

    def start(self):
        context = multiprocessing.get_context("fork")
        arguments = (self._config, os.getpid(), self._slow_s)
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()

    def kill(self):
        """SIGKILL, and wait until it is dead."""
        self.signal(signal.SIGKILL)
        self._process.join(20)
        assert not self._process.is_alive()

    def signal(self, number):
        os.kill(self._process.pid, number)

    def connect(self, *, patience_s=20.0, **options):
        """A RemotePolicy, once the server is ready."""
        return connect(self.address, patience_s=patience_s, connect_s=30.0, **options)

    @property
    def alive(self):
        return self._process.is_alive()

    def close(self):
        if self._process.is_alive():
            self.signal(signal.SIGCONT)
            self.kill()
