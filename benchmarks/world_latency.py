"""Latency of world models' decisions beside a diffusion policy's with a transformer of their size.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.world_latency [--quick] [--only …] [--json …]

PushT's shapes, chunks of 16 × 2, width 128, 4 layers, 4 heads, 10 DDIM steps, random weights, one
thread. `state`: two observations of 2 + 4 numbers; `pictures`: of 2 numbers and 96 × 96 pixels,
predicted as 64 tokens each (UVA: of four frames). Decisions by `act`, what else by `infer`. A
figure is processor time, the median over rounds of the medians within them, contenders taking
turns; a ratio the median of the rounds'. Remarks: multiply-adds of one row, which have no noise.
Parts:

  state-1, state-16, pictures-1, pictures-16   decisions of so many rows
  generation                                   UVA's actions alone, and after what will be seen
"""

import statistics
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.buffer.measure import Row, ratio, spread, take_turns
from benchmarks.inference import parameters, void
from benchmarks.parts import measure_parts
from embodied.core.specs import ArraySpec, DeviceSpec
from policies.acting import InferenceConfig
from policies.build import build_policy
from policies.inference.policy import ActingPolicy

HISTORY, HORIZON, STEPS, SIDE = 2, 16, 10, 96
STATE, ENVIRONMENT, CAMERA = (
    "observation.state",
    "observation.environment_state",
    "observation.images.top",
)
TRANSFORMER = {"width": 128, "heads": 4, "time_dim": 128}
CONTENDERS: dict[str, dict[str, Any]] = {
    "diffusion": {"network": {"name": "dit", "depth": 4, **TRANSFORMER}},
    "uwm": {"depth": 4, **TRANSFORMER},
    "uwm, next left out": {"depth": 4, "left_out": 0.25, **TRANSFORMER},
    "uva": {"encoder_depth": 2, "decoder_depth": 2, **TRANSFORMER},
}
IMAGES = {"encoder": {"name": "resnet18", "width": 16}, "crop": 1.0}
TARGET, GENERATION = 1.5, 5.0
PARTS = ("state-1", "state-16", "pictures-1", "pictures-16", "generation")


def make(name: str, kind: str, **more: Any) -> Any:
    """A policy with random weights everywhere, of what `kind` observes."""
    device = DeviceSpec(
        observation={
            STATE: ArraySpec((2,)),
            ENVIRONMENT: ArraySpec((4,)),
            CAMERA: ArraySpec((SIDE, SIDE, 3), dtype="uint8", low=(0.0,), high=(255.0,)),
        },
        action=ArraySpec((2,), low=(0.0,), high=(512.0,)),
        tick_hz=10.0,
    )
    found: dict[str, Any] = {
        key: SimpleNamespace(mean=[0.0] * n, std=[1.0] * n, min=[-2.0] * n, max=[2.0] * n)
        for key, n in ((STATE, 2), (ENVIRONMENT, 4))
    }
    keys = [STATE, ENVIRONMENT if kind == "state" else CAMERA]
    options = {"horizon": HORIZON, "n_action_steps": 8, "num_steps": STEPS, "images": IMAGES}
    options |= CONTENDERS[name] | more
    policy = build_policy(name.split(",")[0], options, device, keys, found, seed=0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():  # what begins as zero
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=rng))
    return policy


def observations(policy: Any, rows: int) -> dict[str, np.ndarray]:
    """Random ones, as many as it reads."""
    rng = np.random.default_rng(0)
    return {
        key: rng.integers(0, 256, (rows, HISTORY, *array.shape), np.uint8)
        if array.dtype == "uint8"
        else rng.normal(size=(rows, HISTORY, *array.shape)).astype(np.float32)
        for key, array in policy.spec.observation.items()
    }


def decide(policy: Any, rows: int) -> Callable[[], None]:
    """A decision, as in a run."""
    acting = ActingPolicy(policy, InferenceConfig(), rows=rows)
    obs, seed = observations(policy, rows), np.arange(rows)
    return lambda: void(acting.act(acting.init(rows), obs, seed=seed))


def infer(policy: Any, want: set[str]) -> Callable[[], None]:
    """An answer of a world model."""
    obs, seed = observations(policy, 1), np.arange(1)
    return lambda: void(policy.infer(obs, want=want, seed=seed))


def operations(work: Callable[[], None]) -> str:
    """Multiply-adds of matrix products and convolutions, in millions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return f"{counter.get_total_flops() / 2e6:.0f} M multiply-adds"


def act(policy: Any) -> Callable[[], None]:
    """A decision of one row by the policy's own networks, whose operations can be counted."""
    obs, seed = observations(policy, 1), np.arange(1)
    return lambda: void(policy.act(None, obs, seed=seed))


def timed(work: Callable[[], None], seconds: float) -> Callable[[], float]:
    """Median processor time of the work in ms, of three times at least after one more."""

    def measure() -> float:
        work()
        times: list[float] = []
        while sum(times) < seconds or len(times) < 3:
            started_s = time.process_time()
            work()
            times.append(time.process_time() - started_s)
        return 1e3 * statistics.median(times)

    return measure


def rows_of(
    case: str,
    work: Mapping[str, Callable[[], None]],
    base: str,
    targets: Mapping[str, float],
    notes: Mapping[str, str],
    *,
    at_most: bool,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """The table's lines of contenders that take turns."""
    times = take_turns({name: timed(one, seconds) for name, one in work.items()}, rounds)
    return [
        Row(
            case,
            name,
            statistics.median(times[name]),
            "ms",
            ratio(times, name, base),
            targets.get(name),
            at_most=at_most,
            note="; ".join(part for part in (notes.get(name), spread(times[name])) if part),
        )
        for name in work
    ]


def run(part: str, quick: bool) -> list[Row]:
    """Rows of one part."""
    rounds, seconds = (1, 0.0) if quick else (7, 0.3)
    found: list[Row] = []
    if part == "generation":
        for kind, passes in (("state", (1,)), ("pictures", (1, 8))):
            work: dict[str, Callable[[], None]] = {"actions": infer(make("uva", kind), {"actions"})}
            for count in passes:
                policy = make("uva", kind, iterations=count)
                work[f"with what will be seen, {count} passes"] = infer(
                    policy, {"actions", "next_obs"}
                )
            found += rows_of(
                kind,
                work,
                "actions",
                {name: GENERATION for name in work if kind == "pictures" and name != "actions"},
                {name: operations(one) for name, one in work.items()},
                at_most=False,
                rounds=rounds,
                seconds=seconds,
            )
        return found
    kind, rows = part.split("-")
    policies = {name: make(name, kind) for name in CONTENDERS}
    return rows_of(
        f"{kind}, batch {rows}",
        {name: decide(policy, int(rows)) for name, policy in policies.items()},
        "diffusion",
        {name: TARGET for name in CONTENDERS if name != "diffusion"},
        {
            name: f"{parameters(policy)}, {operations(act(policy))}"
            for name, policy in policies.items()
        },
        at_most=True,
        rounds=rounds,
        seconds=seconds,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure_parts(__doc__, PARTS, run, by=f"torch {torch.__version__}")
