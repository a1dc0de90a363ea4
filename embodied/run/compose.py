"""The search for a composed policy's weights, and its report beside its parents."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from embodied.buffer.log.segments import list_segments
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.samplers import WindowSampler
from embodied.core.config import component, convert
from embodied.core.errors import ConfigError
from embodied.core.files import write_atomic
from embodied.core.intervals import paired_bootstrap
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed, make_rng
from embodied.run.build import stored_policy, windows_of
from embodied.run.compose_config import ComposeConfig
from embodied.run.config import TrainConfig
from embodied.run.episode import Result
from embodied.run.evaluate import Evaluator, summarise
from embodied.run.observing import check_robot
from embodied.run.simplex_search import Analytic, Search
from policies.checkpoint import policy_state, save_policy
from policies.compose.analytic import error_products, simplex_weights
from policies.compose.build import compose
from policies.compose.policy import ComposedPolicy
from sim.family import SimConfig, training_seed

_RAM_BYTES = 64 << 20
COMPOSED = "composed"
_BATCH = 256
_LEAST_PRIOR = 1e-6

OnEpisode = Callable[[str], None]
"""Called with what was played after every episode, replayed ones of an earlier sitting included."""


class ComposeRun:
    """One search in its directory. Whatever was played is never played again.

    In the directory: config.json, members.json (digests of the policies, which must not change in
    between), metrics/episodes.jsonl (every episode: contender, seed, result), policy/ (the composed
    policy), results.json.
    """

    def __init__(self, config: ComposeConfig, on_episode: OnEpisode | None = None) -> None:
        """Load the policies and take the directory; ConfigError if they do not go together."""
        self.config = config
        self._on_episode = on_episode or (lambda _: None)
        self.policies, stored = _load(config)
        self.labels = tuple(self.policies)
        first = next((run for run in stored if run is not None), None)
        task = config.task or (first and first.task)
        if not isinstance(task, str):
            raise ConfigError("none of the policies is a run's of one task: say task=...")
        self.task = task
        sim = config.sim or (first.sim if first else SimConfig())
        self._operator = _named(config.operator)
        self._tunable = tunable(self._operator, self.labels)
        search, options = component("searches", _named(config.search), "search")
        self.search: Search = search(options)
        if isinstance(self.search, Analytic) and config.demonstrations is None:
            raise ConfigError("search=analytic works weights out from data: set demonstrations=...")
        self._evaluator = Evaluator(task, sim, rows=config.rows)
        self.run_dir = RunDir(Path(config.output))
        try:
            for label, policy in self.policies.items():
                check_robot(
                    label, policy, self._evaluator.group.spec, self._evaluator.task, goals=True
                )
            self.make(np.full(max(1, len(self._tunable)), 1 / max(1, len(self._tunable))))
            self._open()
        except BaseException:
            self._evaluator.close()
            raise
        self._counted: set[tuple[str, int]] = set()
        self._played: dict[tuple[str, int], Result] = {
            (row["contender"], row["result"]["seed"]): msgspec.convert(row["result"], Result)
            for row in self.run_dir.read("metrics", "episodes")
        }

    def make(self, weights_n: np.ndarray) -> Any:
        """The composed policy with these weights."""
        return compose(
            self.policies,
            weighted(self._operator, self._tunable, weights_n, self.config.total),
            solver=self.config.solver,
            guidance=self.config.guidance,
        )

    def episodes(self) -> int:
        """How many episodes the whole takes at most."""
        n, starts = len(self._tunable), int(self.config.demonstrations is not None)
        searched = self.search.episodes(n, starts) if n > 1 else 0
        return searched + (1 + len(self.labels)) * self.config.episodes

    def execute(self) -> dict[str, Any]:
        """Search, report, save; returns what results.json holds."""
        n = len(self._tunable)
        analytic_n = self._analytic() if self.config.demonstrations else None
        tried: dict[tuple[float, ...], list[float]] = {}

        def evaluate(weights_n: np.ndarray, episodes: int) -> np.ndarray:
            key = tuple(round(float(w), 6) for w in weights_n)
            seeds = [training_seed(self.config.seed, "compose", k) for k in range(episodes)]
            results = self._play(str(list(key)), lambda: self.make(weights_n), seeds, fresh=False)
            tried[key] = [self.score(result) for result in results]
            return np.array(tried[key])

        weights_n = np.ones(max(1, n))
        if n > 1:
            start = [] if analytic_n is None else [analytic_n]
            rng = make_rng(self.config.seed, "compose search")
            weights_n = self.search.run(n, evaluate, start, rng)
        return self._report(weights_n, analytic_n, tried)

    def score(self, result: Result) -> float:
        """What an episode counts; ConfigError if the task has no such signal."""
        if self.config.metric == "success":
            return float(result.success)
        if self.config.metric not in result.peaks:
            raise ConfigError(
                f"metric={self.config.metric}: task '{self.task}' has the signals "
                f"{', '.join(sorted(result.peaks))}"
            )
        return result.peaks[self.config.metric]

    def close(self) -> None:
        """Close the simulated robots and give the directory back."""
        self._evaluator.close()
        self.run_dir.release()

    def _open(self) -> None:
        existed = self.run_dir.exists()
        self.run_dir.acquire()
        digests = {label: _digest(policy) for label, policy in self.policies.items()}
        members = self.run_dir.path / "members.json"
        if not existed:
            write_atomic(members, msgspec.json.encode(digests))
            self.run_dir.write_config(self.config)
            return
        stored = convert(self.run_dir.read_config(), ComposeConfig)
        fields = [field for field in ComposeConfig.__struct_fields__ if field != "rows"]
        odd = [f for f in fields if getattr(stored, f) != getattr(self.config, f)]
        if not odd and (before := msgspec.json.decode(members.read_bytes())) != digests:
            odd = [f"version of '{n}'" for n in digests if before.get(n) != digests[n]]
        if odd:
            self.run_dir.release()
            raise ConfigError(
                f"{self.run_dir.path} holds a search with another {', '.join(odd)}; "
                "choose another output, or the same settings to continue it"
            )

    def _play(
        self, contender: str, make: Callable[[], Any], seeds: Sequence[int], *, fresh: bool
    ) -> list[Result]:
        missing: list[int] = []
        for seed in seeds:
            if (contender, seed) in self._played:
                self._count(contender, seed)
            else:
                missing.append(seed)

        def keep(result: Result) -> None:
            row = {"contender": contender, "result": msgspec.to_builtins(result)}
            self.run_dir.metrics("episodes", row)
            self._played[contender, result.seed] = result
            self._count(contender, result.seed)

        if missing:
            self._evaluator.run(make(), -1, missing, on_result=keep, fresh=fresh)
        return [self._played[contender, seed] for seed in seeds]

    def _count(self, contender: str, seed: int) -> None:
        if (contender, seed) not in self._counted:
            self._counted.add((contender, seed))
            self._on_episode(contender)

    def _analytic(self) -> np.ndarray:
        """Proposition 4.1's weights of the members that are searched over."""
        if not self._tunable:
            raise ConfigError(
                f"demonstrations: operator={self._operator['name']} has no weights to work out"
            )
        members = {label: self.policies[label] for label in self._tunable}
        equal = [1 / len(members)] * len(members)
        mixed = compose(members, {"name": "mix", "weights": equal}, solver=self.config.solver)
        assert isinstance(mixed, ComposedPolicy)
        batches = demonstrations(Path(self.config.demonstrations or ""), mixed, self.config)
        seed = derive_seed(self.config.seed, "analytic weights")
        return simplex_weights(error_products(mixed, batches, seed=seed))

    def _report(
        self,
        weights_n: np.ndarray,
        analytic_n: np.ndarray | None,
        tried: Mapping[tuple[float, ...], list[float]],
    ) -> dict[str, Any]:
        chosen = self.make(weights_n)
        save_policy(self.run_dir.path / "policy", chosen)
        first = self.config.first_seed
        seeds = range(first, first + self.config.episodes)
        contenders = {COMPOSED: chosen, **self.policies}
        played = {
            name: self._play(f"report {name}", lambda p=policy: p, seeds, fresh=True)
            for name, policy in contenders.items()
        }
        scores = {name: [self.score(r) for r in results] for name, results in played.items()}
        better = max(self.labels, key=lambda label: float(np.mean(scores[label])))
        gain, low, high = paired_bootstrap(scores[COMPOSED], scores[better])
        results = {
            "task": self.task,
            "metric": self.config.metric,
            "operator": self._operator,
            "members": list(self._tunable),
            "weights": [float(w) for w in weights_n],
            "analytic_weights": None if analytic_n is None else analytic_n.tolist(),
            "tried": [
                {"weights": list(key), "episodes": len(s), "mean": float(np.mean(s)), "scores": s}
                for key, s in tried.items()
            ],
            "contenders": {
                name: {**summarise(played[name]), "mean": float(np.mean(scores[name]))}
                for name in contenders
            },
            "better_parent": better,
            "gain": gain,
            "gain_interval": [low, high],
            "policy": str(self.run_dir.path / "policy"),
        }
        write_atomic(self.run_dir.path / "results.json", msgspec.json.encode(results))
        return results


def tunable(operator: Mapping[str, Any], labels: Sequence[str]) -> tuple[str, ...]:
    """The members whose weights are searched for; ConfigError if the operator has them already."""
    for field in ("weights", "offsets", "stages"):
        if field in operator:
            raise ConfigError(f"operator.{field} is what the search finds; leave it out")
    match operator.get("name"):
        case "mix" | "product" | "or":
            return tuple(labels)
        case "cfg":
            return tuple(label for label in labels if label != operator.get("unconditional"))
        case _:
            return ()


def weighted(
    operator: Mapping[str, Any], tunable: Sequence[str], weights_n: np.ndarray, total: float
) -> dict[str, Any]:
    """The operator with a point of the simplex as its weights ("or": as the mixture's priors)."""
    values = [float(w) for w in weights_n]
    match operator.get("name"):
        case "mix":
            return {**operator, "weights": values}
        case "product" | "cfg":
            return {**operator, "weights": [total * value for value in values]}
        case "or":
            return {**operator, "offsets": [math.log(max(v, _LEAST_PRIOR)) for v in values]}
        case _:
            return dict(operator)


def demonstrations(
    path: Path, policy: ComposedPolicy, config: ComposeConfig
) -> list[dict[str, Any]]:
    """Batches of windows out of a buffer's folder, or a run's."""
    folder = next((f for f in (path, path / "buffer") if list_segments(f)), None)
    if folder is None:
        raise ConfigError(f"demonstrations={path} is neither a buffer's folder nor a run's")
    spec = windows_of(policy.spec)
    reader = ReplayReader(folder, ram_bytes=_RAM_BYTES)
    try:
        reader.refresh()
        sampler = WindowSampler(reader, spec)
        if not sampler.num_candidates:
            raise ConfigError(f"demonstrations={path} holds no finished episode")
        rng = make_rng(config.seed, "demonstrations")
        sizes = [min(_BATCH, config.windows - k) for k in range(0, config.windows, _BATCH)]
        return [
            {key: np.array(value) for key, value in sampler.sample(size, rng).items()}
            for size in sizes
        ]
    finally:
        reader.close()


def _load(config: ComposeConfig) -> tuple[dict[str, Any], list[TrainConfig | None]]:
    """The policies by label, and the configurations of the runs that they come from."""
    torch.set_num_threads(1)
    paths = [Path(path) for path in config.policies]
    if len(paths) < 2:
        raise ConfigError("policies names fewer than two: policies=[A,B]")
    labels = config.labels or tuple(_label(path) for path in paths)
    if len(set(labels)) < len(labels):
        raise ConfigError(f"two policies are called {sorted(labels)}: set labels=[...]")
    if COMPOSED in labels:
        raise ConfigError(f"'{COMPOSED}' is what the composition is called: set labels=[...]")
    found: dict[str, Any] = {}
    stored: list[TrainConfig | None] = []
    for label, path in zip(labels, paths, strict=True):
        found[label], _, run = stored_policy(path)
        stored.append(run)
    return found, stored


def _digest(policy: Any) -> str:
    """SHA-256 of a policy's configuration and arrays."""
    config, arrays = policy_state(policy)
    found = hashlib.sha256(msgspec.json.encode(config, order="sorted"))
    for name in sorted(arrays):
        found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()


def _label(path: Path) -> str:
    """A run's name, also for the policy folder in it."""
    return path.resolve().parent.name if path.name == "policy" else path.resolve().name


def _named(value: str | dict[str, Any]) -> dict[str, Any]:
    return {"name": value} if isinstance(value, str) else value
