"""Latency of a decision, and training steps, beside LeRobot's DiffusionPolicy.

    .venv/bin/python -m benchmarks.inference [--quick] [--only small,full,…] [--json FILE]

PushT's shapes without pictures: two observations of 2 + 4 numbers, chunks of 16 × 2 of which 8 are
executed, 10 DDIM steps; the same U-Net channels, kernel, groups and time embedding. Ours is asked
through `act` (arrays in, arrays out, normalisers, noise), LeRobot's through `generate_actions` on
normalised tensors. Contenders take turns within every round; a figure is the median over rounds of
the medians within them, a ratio the median of the rounds' ratios. With --json, parts whose rows are
in the file are not run again. Parts:

  small     channels 64, 128, 256, batch 1
  full      channels 512, 1024, 2048, LeRobot's default, batch 1
  batch     channels 64, 128, 256, batch 5
  composed  two of ours against one, small and full: both members are evaluated at every step
  compiled  the small one by torch.compile, with the time that this takes
  training  gradient steps a second: loss, backward, clipping, optimiser (ours: and the averages)
"""

import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")  # the most that any contender is given

import numpy as np
import torch

from benchmarks.buffer.measure import Row, ratio, spread, take_turns
from benchmarks.parts import measure_parts
from embodied.core.specs import ArraySpec, DeviceSpec
from policies.acting import InferenceConfig
from policies.build import build_policy
from policies.compose.build import compose
from policies.inference.policy import ActingPolicy

SMALL, FULL = (64, 128, 256), (512, 1024, 2048)
STEPS, HORIZON, EXECUTED, HISTORY = 10, 16, 8, 2
STATE, ENVIRONMENT = "observation.state", "observation.environment_state"
SIZES = {STATE: 2, ENVIRONMENT: 4}
TARGET, COMPOSED = 2.0, 1.6
EQUAL = "float32, eager, 1 thread"
PARTS = ("small", "full", "batch", "composed", "compiled", "training")

Times = dict[str, list[float]]


def ours(channels: tuple[int, ...]) -> Any:
    """Our diffusion policy with random weights everywhere."""
    device = DeviceSpec(
        observation={key: ArraySpec((size,)) for key, size in SIZES.items()},
        action=ArraySpec((2,), low=(0.0,), high=(512.0,)),
        tick_hz=10.0,
    )
    statistics_of = {
        key: SimpleNamespace(mean=[0.0] * n, std=[1.0] * n, min=[-2.0] * n, max=[2.0] * n)
        for key, n in SIZES.items()
    }
    network = {"name": "unet1d", "channels": list(channels), "time_dim": 128}
    options = {"network": network, "horizon": HORIZON, "n_action_steps": EXECUTED}
    policy = build_policy(
        "diffusion", {**options, "num_steps": STEPS}, device, list(SIZES), statistics_of, seed=0
    )
    torch.nn.init.normal_(policy.network.outlet.weight, std=0.02)
    return policy


def lerobots(channels: tuple[int, ...], *, compiled: bool = False) -> Any:
    """LeRobot's DiffusionPolicy of the same shapes."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    config = DiffusionConfig(
        n_obs_steps=HISTORY,
        horizon=HORIZON,
        n_action_steps=EXECUTED,
        down_dims=channels,
        noise_scheduler_type="DDIM",
        num_inference_steps=STEPS,
        compile_model=compiled,
        device="cpu",
        input_features={
            STATE: PolicyFeature(FeatureType.STATE, (2,)),
            ENVIRONMENT: PolicyFeature(FeatureType.ENV, (4,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    )
    return DiffusionPolicy(config)


def parameters(policy: Any) -> str:
    """Parameters of a policy in millions."""
    return f"{sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters"


def decide_ours(policy: Any, rows: int, **options: Any) -> Callable[[], None]:
    """One decision of ours."""
    acting = ActingPolicy(policy, InferenceConfig(**options), rows=rows)
    rng, seed = np.random.default_rng(0), np.arange(rows)
    obs = {k: rng.normal(size=(rows, HISTORY, n)).astype(np.float32) for k, n in SIZES.items()}
    carry = acting.init(rows)
    return lambda: void(acting.act(carry, obs, seed=seed))


def decide_lerobots(policy: Any, rows: int) -> Callable[[], None]:
    """One decision of LeRobot's."""
    policy.eval()
    obs = {key: torch.randn(rows, HISTORY, n) for key, n in SIZES.items()}

    def decide() -> None:
        with torch.inference_mode():
            policy.diffusion.generate_actions(obs)

    return decide


def void(_: Any) -> None:
    """Drop a result."""


def timed(work: Callable[[], None], threads: int, seconds: float) -> Callable[[], float]:
    """Median time of the work in ms, of at least three times, after one that does not count."""

    def measure() -> float:
        torch.set_num_threads(threads)
        work()
        times: list[float] = []
        while sum(times) < seconds or len(times) < 3:
            started_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - started_s)
        return 1e3 * statistics.median(times)

    return measure


def latency(channels: tuple[int, ...], rows: int, rounds: int, seconds: float) -> list[Row]:
    """Rows of one network and batch."""
    mine, theirs = ours(channels), lerobots(channels)
    plain = decide_ours(mine, rows, packed=False)
    packed = decide_ours(mine, rows)
    half = decide_ours(mine, rows, dtype="bfloat16")
    other = decide_lerobots(theirs, rows)
    contenders = {
        f"LeRobot, {EQUAL}": timed(other, 1, seconds),
        f"ours, {EQUAL}": timed(packed, 1, seconds),
        "ours, the same without packed weights": timed(plain, 1, seconds),
        "LeRobot, float32, eager, 2 threads": timed(other, 2, seconds),
        "ours, float32, eager, 2 threads": timed(packed, 2, seconds),
        "ours, bfloat16, eager, 1 thread": timed(half, 1, seconds),
        "ours, bfloat16, eager, 2 threads": timed(half, 2, seconds),
    }
    times = take_turns(contenders, rounds)
    case = f"{'-'.join(map(str, channels))}, batch {rows}"
    sizes = {"LeRobot": parameters(theirs), "ours": parameters(mine)}
    found: list[Row] = []
    for name in contenders:
        found.append(
            Row(
                case,
                name,
                statistics.median(times[name]),
                "ms",
                ratio(times, f"LeRobot, {EQUAL}", name),
                TARGET if name == f"ours, {EQUAL}" and rows == 1 else None,
                note=f"{sizes[name.split(',')[0]]}; {spread(times[name])}",
            )
        )
    return found


def composed(channels: tuple[int, ...], rounds: int, seconds: float) -> list[Row]:
    """A mix of two policies against one of them."""
    policies = {"a": ours(channels), "b": ours(channels)}
    mix = compose(policies, {"name": "mix", "weights": [0.5, 0.5]})
    one = "one, 1 thread"
    contenders = {
        one: timed(decide_ours(policies["a"], 1), 1, seconds),
        "one, 2 threads": timed(decide_ours(policies["a"], 1), 2, seconds),
        "composed of two, 1 thread": timed(decide_ours(mix, 1), 1, seconds),
        "composed of two, 1 thread each": timed(decide_ours(mix, 1, parallel=True), 1, seconds),
    }
    times = take_turns(contenders, rounds)
    return [
        Row(
            f"{'-'.join(map(str, channels))}, batch 1",
            name,
            statistics.median(times[name]),
            "ms",
            ratio(times, name, one),
            COMPOSED if name.endswith("each") else None,
            at_most=True,
            note=f"ratio to {one}; {spread(times[name])}",
        )
        for name in contenders
    ]


def compiled(rounds: int, seconds: float) -> list[Row]:
    """The small network by torch.compile, at batch 1."""
    mine, theirs = ours(SMALL), lerobots(SMALL, compiled=True)
    first = {
        "LeRobot, compiled, 1 thread": decide_lerobots(theirs, 1),
        "ours, compiled, 1 thread": decide_ours(mine, 1, compile=True, warm_up=False),
    }
    torch.set_num_threads(1)
    compile_s: dict[str, float] = {}
    for name, decide in first.items():
        started_s = time.perf_counter()
        decide()
        compile_s[name] = time.perf_counter() - started_s
    work = {**first, "ours, packed, 1 thread": decide_ours(mine, 1)}
    times = take_turns({name: timed(decide, 1, seconds) for name, decide in work.items()}, rounds)
    return [
        Row(
            "64-128-256, batch 1",
            name,
            statistics.median(times[name]),
            "ms",
            ratio(times, "LeRobot, compiled, 1 thread", name),
            note=f"first decision {compile_s.get(name, 0):.0f} s; {spread(times[name])}",
        )
        for name in work
    ]


def train_ours(channels: tuple[int, ...], batch: int, precision: str) -> Callable[[], None]:
    """One gradient step of ours: the learner's own."""
    from embodied.learn.config import LearnerConfig
    from embodied.learn.learner import Learner, PolicyFormat
    from policies.checkpoint import policy_from_state, policy_state

    config = LearnerConfig(
        batch_size=batch,
        steps=1_000_000,
        minutes=None,
        learning_rate=1e-4,
        weight_decay=1e-6,
        warmup_steps=0,
        max_grad_norm=10.0,
        precision=precision,  # type: ignore[arg-type]
        ema_decay=0.999,
        threads=1,
        publish_every=1,
        checkpoint_every=1,
        steps_per_round=1,
        samples_per_insert=None,
    )
    formats = PolicyFormat((), lambda stats: None, policy_state, policy_from_state)
    learner = Learner(ours(channels), formats, config, seed=0)
    data: dict[str, np.ndarray] = {k: v.numpy() for k, v in _batch(batch).items()}
    data["action"] = 256 * (data["action"] + 1)
    return lambda: void(learner.update(data))


def train_lerobots(channels: tuple[int, ...], batch: int, precision: str) -> Callable[[], None]:
    """One gradient step of LeRobot's, as its training script takes it."""
    policy = lerobots(channels)
    policy.train()
    options = policy.config.get_optimizer_preset()
    optimizer = options.build(policy.get_optim_params())
    data = _batch(batch)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss, _ = policy.forward(data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), options.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _batch(batch: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    data = {key: torch.randn(batch, HISTORY, n, generator=rng) for key, n in SIZES.items()}
    data["action"] = 2 * torch.rand(batch, HORIZON, 2, generator=rng) - 1
    return {**data, "action_is_pad": torch.zeros(batch, HORIZON, dtype=torch.bool)}


def training(rounds: int, seconds: float, *, full: bool) -> list[Row]:
    """Rows of training, the large network at one batch and setting only: it takes seconds."""
    found: list[Row] = []
    cases = [(SMALL, 64), (SMALL, 256), *([(FULL, 64)] if full else [])]
    for channels, batch in cases:
        settings = [("float32", 1), ("float32", 2), ("bfloat16", 2)]
        if channels == FULL:
            rounds, seconds, settings = min(rounds, 3), 0.0, [("bfloat16", 2)]
        work: dict[str, Callable[[], float]] = {}
        for precision, threads in settings:
            for name, make in (("LeRobot", train_lerobots), ("ours", train_ours)):
                label = f"{name}, {precision}, {threads} thread{'s' * (threads > 1)}"
                work[label] = timed(make(channels, batch, precision), threads, seconds)
        times = take_turns(work, rounds)
        best = min((n for n in times if n[0] == "L"), key=lambda n: statistics.median(times[n]))
        mine = min((n for n in times if n[0] == "o"), key=lambda n: statistics.median(times[n]))
        for name in work:
            found.append(
                Row(
                    f"training, {'-'.join(map(str, channels))}, batch {batch}",
                    name,
                    1e3 / statistics.median(times[name]),
                    "steps/s",
                    ratio(times, best, name),
                    1.0 if name == mine else None,
                    note=f"ratio to LeRobot's best; {spread(times[name])}",
                )
            )
    return found


def run(part: str, quick: bool) -> list[Row]:
    """Rows of one part."""
    rounds, seconds = (2, 0.2) if quick else (5, 1.0)
    match part:
        case "small":
            return latency(SMALL, 1, rounds, seconds)
        case "full":
            return latency(SMALL if quick else FULL, 1, min(rounds, 3), 0.0)
        case "batch":
            return latency(SMALL, 5, rounds, seconds)
        case "composed":
            rows = composed(SMALL, rounds, seconds)
            return rows if quick else [*rows, *composed(FULL, min(rounds, 3), 0.0)]
        case "compiled":
            return compiled(rounds, seconds)
        case _:
            return training(rounds, seconds, full=not quick)


if __name__ == "__main__":
    measure_parts(__doc__, PARTS, run, by=f"torch {torch.__version__}")
