"""One pair's parents, search, report and controls, each kept as soon as it is there."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.cloning import Demonstrations, OurTrainee, play_pieces
from benchmarks.study_compose.pairs import Pair, Parent, Recipe, Table
from embodied.buffer.interchange.recorded import RecordedEpisodes
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.config import component, compose, convert
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed
from embodied.run import build
from embodied.run.collect import collect
from embodied.run.compose import ComposeRun
from embodied.run.compose_config import ComposeConfig
from embodied.run.config import CollectConfig, TrainConfig, load_train
from embodied.run.evaluate import Evaluator
from policies.checkpoint import load_policy
from policies.compose.build import compose as compose_policies
from policies.folder import MODEL
from sim.family import SimConfig

ROWS = 20
LABELS = ("a", "b")
RANDOM = {"name": "pooled", "proposals": 1, "temperature": 1e9}
"""A parent drawn at random for each chunk."""


class TimeUp(Exception):
    """The command's time is used up; everything so far is kept."""


class Work:
    """The study in its folder. going: asked between any two pieces of a few minutes at most."""

    def __init__(
        self, root: Path, table: Table, data: str, piece_s: float, going: Callable[[], bool]
    ) -> None:
        self._root, self._table, self._data = root, table, data
        self._piece_s, self._going = piece_s, going
        self._demonstrations: dict[str, Demonstrations] = {}
        self._sim = SimConfig(horizon=table.horizon)

    def parents(self, name: str) -> None:
        """Train both; TimeUp says that there is more to do."""
        for label in LABELS:
            self._train(self._root / name / label, self._table.pairs[name], label, times=1)

    def fingerprints(self, name: str) -> list[str]:
        """A line for each parent: what it is called and the SHA-256 of its weights."""
        files = {label: self._root / name / label / "policy" / MODEL for label in LABELS}
        return [
            f"{name}/{label} {hashlib.sha256(path.read_bytes()).hexdigest()}"
            for label, path in files.items()
        ]

    def compositions(self, name: str) -> None:
        """Search, report and controls of trained parents, what is missing; TimeUp as above."""
        pair = self._table.pairs[name]
        self._search(name, pair)
        better = self.better(name)
        double = self._root / name / "double"
        self._train(double, pair, better, times=self._table.budget.double)
        self._controls(name, pair)

    def better(self, name: str) -> str:
        """Label of the parent with the greater mean over the first episodes of the search."""
        tried = {tuple(t["weights"]): t["scores"] for t in self.results(name)["tried"]}
        first = int(self._table.budget.search["first_episodes"])
        means = [np.mean(tried[corner][:first]) for corner in ((1.0, 0.0), (0.0, 1.0))]
        return LABELS[int(np.argmax(means))]

    def results(self, name: str) -> dict[str, Any]:
        """What `embodied compose` reports of the pair."""
        path = self._root / name / "search" / "results.json"
        return msgspec.json.decode(path.read_bytes())

    def scores(self, name: str) -> dict[str, list[float]]:
        """Of every contender on the same fresh start states; empty while any is missing."""
        budget = self._table.budget
        search = RunDir(self._root / name / "search")
        controls = RunDir(self._root / name / "controls")
        rows = {
            label: [
                row["result"]
                for row in search.read("metrics", "episodes")
                if row["contender"] == f"report {label}"
            ]
            for label in ("composed", *LABELS)
        }
        rows |= {control: controls.read("metrics", control) for control in ("random", "double")}
        if any(len(found) < budget.episodes for found in rows.values()):
            return {}
        metric = self._recipe(name).metric
        return {
            contender: [_score(found, metric) for found in sorted(rs, key=lambda r: r["seed"])]
            for contender, rs in rows.items()
        }

    def _recipe(self, name: str) -> Recipe:
        return self._table.tasks[self._table.pairs[name].task]

    def _train(self, folder: Path, pair: Pair, label: str, *, times: int) -> None:
        parent: Parent = getattr(pair, label)
        config = self._config(pair.task, parent, times)
        run = RunDir(folder)
        run.acquire()
        try:
            trainee = OurTrainee(
                folder,
                self._demonstrated(pair.task).only(slice(parent.half, None, 2)),
                build.device_spec(config),
                parent.keys,
                config.policy,
                config.learner,
                seed=derive_seed(0, "study", folder.parent.name, label),
                samplers={},
            )
            while not trainee.done:
                self._check()
                trainee.learn(self._piece_s)
                where = f"{folder.parent.name}/{folder.name}"
                print(f"{where}: {trainee.step} steps in {trainee.seconds:.0f} s", flush=True)
        finally:
            run.release()

    def _search(self, name: str, pair: Pair) -> None:
        folder, budget = self._root / name, self._table.budget
        config = convert(
            {
                **compose("compose", ["policies=[a,b]", "output=search"]),
                "policies": [str(folder / label / "policy") for label in LABELS],
                "labels": list(LABELS),
                "task": pair.task,
                "sim": msgspec.to_builtins(self._sim),
                "search": dict(budget.search),
                "metric": self._recipe(name).metric,
                "episodes": budget.episodes,
                "first_seed": budget.first_seed,
                "rows": min(ROWS, budget.episodes),
                "output": str(folder / "search"),
            },
            ComposeConfig,
        )
        if (folder / "search" / "results.json").exists():
            return
        self._check()
        search = ComposeRun(config, lambda _: self._check())
        try:
            search.execute()
        finally:
            search.close()

    def _controls(self, name: str, pair: Pair) -> None:
        folder, budget = self._root / name, self._table.budget
        seeds = range(budget.first_seed, budget.first_seed + budget.episodes)

        def at_random() -> Any:
            parents = {label: load_policy(folder / label / "policy") for label in LABELS}
            return compose_policies(parents, RANDOM)

        def double() -> Any:
            return load_policy(folder / "double" / "policy")

        run = RunDir(folder / "controls")
        run.acquire()
        evaluator = Evaluator(pair.task, self._sim, rows=min(ROWS, len(seeds)))
        try:
            for control, make in (("random", at_random), ("double", double)):
                if not play_pieces(run, control, evaluator, make, seeds, self._going):
                    raise TimeUp
        finally:
            evaluator.close()
            run.release()

    def _config(self, task: str, parent: Parent, times: int) -> TrainConfig:
        source = ["experiment=pusht", f"demonstrations.dataset.path={self._data}"]
        scripted = [f"task={task}", "algorithm=bc"]
        return load_train(
            [
                *(source if task == "pusht" else scripted),
                *parent.overrides,
                "learner.minutes=null",
                f"learner.steps={times * parent.steps}",
                "learner.precision=bfloat16",
            ]
        )

    def _demonstrated(self, task: str) -> Demonstrations:
        if task not in self._demonstrations:
            self._demonstrations[task] = self._collected(task)
        return self._demonstrations[task]

    def _collected(self, task: str) -> Demonstrations:
        count = self._table.tasks[task].demonstrations
        if count is None:
            config = load_train(["experiment=pusht", f"demonstrations.dataset.path={self._data}"])
            cls, options = component("datasets", config.demonstrations.dataset, "dataset")
            return Demonstrations.of(cls(options).episodes())
        folder = self._root / "demonstrations" / task.replace("/", "-")
        finished = folder / "finished"
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            overrides = [f"task={task}", f"demonstrations.episodes={count}", f"output={folder}"]
            with LocalBuffer(folder / "buffer") as sink:
                collect(convert(compose("collect", overrides), CollectConfig), sink)
            finished.touch()
        recorded = RecordedEpisodes(RecordedEpisodes.Config(path=str(folder / "buffer")))
        good = [e for e in recorded.episodes() if any(step.success for step in e)]
        return Demonstrations.of(good[:count])

    def _check(self) -> None:
        if not self._going():
            raise TimeUp


def _score(result: dict[str, Any], metric: str) -> float:
    return float(result["success"]) if metric == "success" else result["peaks"][metric]
