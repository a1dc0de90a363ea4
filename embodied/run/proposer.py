"""A process that proposes chunks beside a learner: python -m embodied.run.proposer WEIGHTS OFFERED
DEVICE PRECISION THREADS PARENT DESCRIPTOR.

WEIGHTS, OFFERED: folders of weight stores, of which it takes the newest weights. PARENT: number of
the learner's process. DESCRIPTOR: of an inherited end of a connection to it.
Shapes: M observations, n proposals for each, H chunk, D action.
"""

import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied.comms.channels import error_reply
from embodied.comms.pair import PairEnd
from embodied.core.errors import CorruptDataError, EmbodiedError, LinkError
from embodied.core.processes import die_with_parent
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed
from embodied.learn.proposers import REQUESTS, Propose, Proposed, Proposers
from embodied.run.algorithm import improvement_options, make_algorithm
from embodied.run.config import TrainConfig
from embodied.weights.store import WeightStore, WeightWatcher
from policies.checkpoint import load_arrays, policy_from_state

OFFERED = "proposers"
"""Folder of a run with the weights that proposers take until the first are published."""


def start_proposers(run: RunDir, config: TrainConfig) -> Proposers:
    """Those of a run's learner, as many as its algorithm wants."""
    algorithm, learner = make_algorithm(config.algorithm), config.learner
    offered = run.path / OFFERED
    command = [sys.executable, "-m", "embodied.run.proposer", str(run.weights), str(offered)]
    command += [learner.device, learner.precision, str(config.inference.threads)]
    return Proposers(
        command,
        algorithm.proposers,
        proposals=improvement_options(algorithm).proposals,
        seed=derive_seed(config.seed, "proposers"),
        weights=WeightStore(offered),
        on_restart=lambda reason: run.event("proposer restarted", reason=reason),
    )


class Proposer:
    """The policy of the newest weights, which is an improved one's own, draws."""

    def __init__(self, folders: list[Path], device: torch.device, precision: str) -> None:
        self._watchers = [WeightWatcher(WeightStore(folder)) for folder in folders]
        self._device = device
        self._reduced = precision == "bfloat16"
        self._improved: Any = None
        self._step = -1

    def propose(self, request: Propose, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Chunks [M, n, H, D] for observations [M, To, …]; CorruptDataError without weights."""
        self._follow()
        if self._improved is None:
            faults = [str(w.last_error) for w in self._watchers if w.last_error is not None]
            raise CorruptDataError(f"no weights to propose by: {'; '.join(faults) or 'none there'}")
        tensors = {key: torch.tensor(x, device=self._device) for key, x in observation.items()}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._reduced):
            drawn = self._improved.propose(tensors, request.count, seed=request.seed)
        return drawn.float().cpu().numpy()

    def _follow(self) -> None:
        for watcher in self._watchers:
            found = watcher.poll()
            if found is None or found[1].metadata["step"] <= self._step:
                continue
            arrays, manifest = found
            if self._improved is None:
                improved = policy_from_state(manifest.config, arrays)
                self._improved = improved.to(self._device).eval()
            else:
                load_arrays(self._improved, arrays)
            self._step = manifest.metadata["step"]


def serve(end: PairEnd, proposer: Proposer) -> None:
    """Answer until the other end is gone (LinkError)."""
    while True:
        request = end.receive()
        try:
            chunks = proposer.propose(request.header, request.arrays)
        except EmbodiedError as error:
            end.send(request.id, error_reply(error), {})
        else:
            end.send(request.id, Proposed(), {"chunks": chunks})


def main() -> None:
    """Serve the learner until it hangs up."""
    *folders, device, precision, threads, parent, descriptor = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(int(parent))
    torch.set_num_threads(int(threads))
    proposer = Proposer([Path(folder) for folder in folders], torch.device(device), precision)
    try:
        serve(PairEnd(socket.socket(fileno=int(descriptor)), REQUESTS), proposer)
    except LinkError:
        return


if __name__ == "__main__":
    main()
