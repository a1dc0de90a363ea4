"""The role that evaluates."""

import time
from collections.abc import Callable

from embodied.core.errors import CorruptDataError
from embodied.core.processes import give_way, leave_cores
from embodied.run import build
from embodied.run.context import Context
from embodied.run.evaluate import Evaluators
from embodied.weights.store import VersionGoneError, WeightManifest, WeightStore

_POLL_S = 0.2
_NICENESS = 5


def evaluator_role(context: Context) -> None:
    """Evaluates the newest weights on robots of its own, the last ones at full length.

    torch is loaded when there is something to evaluate: a run that begins, or begins again, has
    better use for its cores.
    """
    give_way(_NICENESS)
    leave_cores(context.config.learner.threads)
    run, evaluation = context.run, context.config.evaluation
    store, sitting = WeightStore(run.weights), run.sitting()
    evaluator = Evaluators(context.config.tasks, context.config.sim, rows=evaluation.rows)
    done_step = max((row["step"] for row in run.read("metrics", "evaluation")), default=0)
    damaged: set[int] = set()
    try:
        while True:
            context.check(state="waiting")
            version = store.latest_version()
            if version is None or version in damaged:
                time.sleep(_POLL_S)
                continue
            final = False
            try:
                manifest = store.manifest(version)
                final, step = _ends(manifest, sitting), int(manifest.metadata["step"])
                episodes = evaluation.final_episodes if final else evaluation.episodes
                due = final or step - done_step >= evaluation.every_steps
                if due and episodes:
                    due = _evaluate(context, evaluator, store, version, episodes, final)
            except VersionGoneError:
                continue
            except CorruptDataError as error:
                if final:
                    raise
                damaged.add(version)
                run.event("weights damaged", version=version, error=str(error))
                continue
            if due:
                done_step = step
            elif not final:
                time.sleep(_POLL_S)
            if final and (due or not episodes):
                return
    finally:
        evaluator.close()


def _evaluate(
    context: Context,
    evaluator: Evaluators,
    store: WeightStore,
    version: int,
    episodes: int,
    final: bool,
) -> bool:
    """Evaluate one version; False if the last weights came meanwhile and it was given up."""
    import torch

    from policies.checkpoint import policy_from_state
    from policies.inference.policy import ActingPolicy

    run, config = context.run, context.config
    torch.set_num_threads(config.inference.threads)
    arrays, manifest = store.load(version)
    step = int(manifest.metadata["step"])
    results = evaluator.run(
        ActingPolicy(
            policy_from_state(manifest.config, arrays),
            config.inference,
            rows=config.evaluation.rows,
        ),
        version,
        range(episodes),
        films=build.film_paths(run, config, f"step{step:07d}"),
        keep_going=_unless_final(context, store, version),
    )
    if len(results) < episodes * len(config.tasks):
        return False
    if evaluator.film_fault is not None:
        run.event("no films", error=evaluator.film_fault)
    row = build.evaluation_row(version, manifest.metadata, final, results)
    run.metrics("evaluation", row)
    context.pulse.note(success=row["success_rate"], reward=row["max_reward"], evaluated_step=step)
    return True


def _ends(manifest: WeightManifest, sitting: int) -> bool:
    """Whether these are the last weights of this sitting; an earlier one's do not end a run."""
    return bool(manifest.metadata["final"]) and manifest.metadata.get("sitting") == sitting


def _unless_final(context: Context, store: WeightStore, version: int) -> Callable[[], bool]:
    ticks, sitting = 0, context.run.sitting()

    def keep_going() -> bool:
        nonlocal ticks
        ticks += 1
        if ticks % 20:
            return True
        context.check(state="evaluating")
        newest = store.latest_version()
        if newest is None or newest == version:
            return True
        try:
            return not _ends(store.manifest(newest), sitting)
        except (VersionGoneError, CorruptDataError):
            return True

    return keep_going
