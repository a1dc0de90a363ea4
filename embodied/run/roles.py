"""The processes of a run on one machine: buffer, actors, learner, evaluator."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from embodied.buffer.serve.client import BufferClient
from embodied.buffer.serve.service import BufferService
from embodied.core.config import convert
from embodied.core.errors import (
    ConfigError,
    CorruptDataError,
    DeviceLostError,
    EmbodiedError,
    LinkError,
    StorageFullError,
)
from embodied.core.processes import die_with_parent
from embodied.core.rundir import RunDir
from embodied.run import build
from embodied.run.config import TrainConfig
from embodied.run.evaluate import Evaluator
from embodied.run.loader import start_loader
from embodied.run.telemetry import Pulse, address
from embodied.weights.store import VersionGoneError, WeightManifest, WeightStore

FAILED = 3
"""Exit status of a role that met an error a restart cannot mend."""

STOPPED = 4
"""Exit status of a role that was asked to end; one that was not asked by us is restarted."""

_REPORT_S = 2.0
_IDLE_S = 0.05
_POLL_S = 0.2
_EVALUATOR_NICENESS = 5


class Stop(Exception):
    """The supervisor asked this role to end."""


class Context:
    """What every role has: its run, its configuration, its pulse, and when to end."""

    def __init__(self, role: str, run: RunDir, socket_dir: str, supervisor_pid: int) -> None:
        self.role = role
        self.run = run
        run.attach()
        self.socket_dir = socket_dir
        self.config = convert(run.read_config(), TrainConfig)
        self.pulse = Pulse(socket_dir, role, os.getpid())
        self.stopping = False
        self._supervisor_pid = supervisor_pid
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _stop(self, signum: int, frame: Any) -> None:
        self.stopping = True

    def check(self, **values: float | int | str | bool | None) -> None:
        """Send the pulse; raise Stop if the role should end."""
        self.pulse.note(**values)
        if self.stopping or os.getppid() != self._supervisor_pid:
            raise Stop

    @property
    def index(self) -> int:
        """Number of this role among those of its kind."""
        return int("".join(filter(str.isdigit, self.role)) or 0)


def buffer_role(context: Context) -> None:
    """The one writer of the replay log."""
    buffer = context.config.buffer
    service = BufferService(
        context.run.buffer,
        address(context.socket_dir, "buffer"),
        segment_bytes=buffer.segment_mib << 20,
        retention=buffer.retention,
    )
    try:
        while True:
            service.poll(0.2)
            context.check(state="serving")
    finally:
        service.close()


def actor_role(context: Context) -> None:
    """Robots that act; their steps go to the buffer, weights come between chunks."""
    from embodied.run.actor import Actor
    from embodied.run.lockstep import result_row

    run, config = context.run, context.config
    results: list[Any] = []

    def on_result(result: Any) -> None:
        results.append(result)
        run.metrics(context.role, result_row(result))

    codecs = config.buffer.codecs
    with BufferClient(address(context.socket_dir, "buffer"), context.role, codecs=codecs) as sink:
        actor = Actor(
            config,
            context.index,
            sink,
            WeightStore(run.weights),
            on_result,
            sitting=run.sitting(),
            speed=config.actors.speed,
            holder=f"{run.path.name}/{context.role}",
        )
        try:
            actor.recall(build.make_reader(run, config))
            _act(context, actor, sink, results)
        finally:
            try:
                sink.flush(timeout_s=10.0)
            finally:
                actor.close()


def _act(context: Context, actor: Any, sink: BufferClient, results: list[Any]) -> None:
    run = context.run
    started_s, ticks, polled_s = time.monotonic(), 0, 0.0
    ages_s: list[float] = []
    while True:
        if time.monotonic() - polled_s > 0.2:
            polled_s = time.monotonic()
            actor.poll_weights()
            context.check(
                episodes=len(results),
                demonstrating=actor.demonstrating,
                version=actor.version,
                fault=str(sink.last_error)
                if sink.last_error and sink.unacknowledged
                else actor.fault or None,
            )
        decisions, losses = len(actor.latencies_s), actor.losses
        actor.tick()
        if actor.losses > losses:
            run.event("device lost", role=context.role, error=actor.fault)
        if len(actor.latencies_s) > decisions and actor.published_ns:
            ages_s.append((time.monotonic_ns() - actor.published_ns) / 1e9)
        if actor.idle:
            sink.flush(timeout_s=10.0)
            context.check()
            time.sleep(_IDLE_S)
        elapsed_s = time.monotonic() - started_s
        if elapsed_s >= _REPORT_S:
            rate = (actor.ticks - ticks) / elapsed_s
            row: dict[str, Any] = {
                "steps_per_s": rate,
                "unacknowledged": sink.unacknowledged,
                "rejected": actor.rejected,
            }
            if actor.latencies_s:
                row["latency_ms"] = [round(1e3 * x, 3) for x in actor.latencies_s]
                row["weight_age_s"] = [round(x, 3) for x in ages_s]
            run.timings(context.role, row)
            context.check(steps_per_s=rate)
            started_s, ticks = time.monotonic(), actor.ticks
            actor.latencies_s.clear()
            ages_s.clear()


def learner_role(context: Context) -> None:
    """Gradient steps until the budget is used up; publishes weights and checkpoints."""
    import torch

    run, config = context.run, context.config
    torch.set_num_threads(config.learner.threads)
    if config.learner.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"learner.device=cuda: torch {torch.__version__} cannot use a GPU here "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}); install a torch "
            "built for this host's CUDA driver, or use learner.device=cpu"
        )
    rows: list[dict[str, Any]] = []

    def on_metrics(row: dict[str, Any]) -> None:
        rows.append(row)
        run.metrics("learner", row)

    loader = partial(start_loader, run) if config.buffer.loader else None
    trainer = build.make_trainer(run, config, on_metrics, loader)
    wanted = build.demonstrations_wanted(config)
    while (found := trainer.demonstrations()) < wanted:
        context.check(state="waiting", demonstrations=found)
        time.sleep(_IDLE_S)
    trainer.start()
    try:
        _learn(context, trainer, rows)
    except Stop:
        trainer.save()
        raise
    finally:
        trainer.close()
    trainer.save()
    trainer.publish(final=True)


def _learn(context: Context, trainer: Any, rows: list[dict[str, Any]]) -> None:
    started_s, steps, cpu_s, waited_s = time.monotonic(), trainer.step, time.process_time(), 0.0
    data_s = trainer.waited_s
    while not trainer.done:
        if not trainer.update():
            waited_s += _IDLE_S
            context.check(state="limited by the data")
            time.sleep(_IDLE_S)
        if trainer.publish_due():
            trainer.publish(final=False)
        if trainer.checkpoint_due():
            trainer.save()
        elapsed_s = time.monotonic() - started_s
        if elapsed_s >= _REPORT_S:
            rate = (trainer.step - steps) / elapsed_s
            context.run.timings(
                "learner",
                {
                    "step": trainer.step,
                    "steps_per_s": rate,
                    "cpu_share": (time.process_time() - cpu_s) / elapsed_s,
                    "waited_s": waited_s,
                    "data_share": (trainer.waited_s - data_s) / elapsed_s,
                },
            )
            data_s = trainer.waited_s
            started_s, steps, cpu_s = time.monotonic(), trainer.step, time.process_time()
            waited_s = 0.0
            context.check(steps_per_s=rate)
        context.check(
            state="training",
            step=trainer.step,
            progress=trainer.learner.progress,
            seconds=trainer.learner.seconds,
            loss=rows[-1]["loss"] if rows else None,
        )


def evaluator_role(context: Context) -> None:
    """Evaluates the newest weights on robots of its own, the last ones at full length."""
    import torch

    os.nice(_EVALUATOR_NICENESS)
    torch.set_num_threads(1)
    run, evaluation = context.run, context.config.evaluation
    store, sitting = WeightStore(run.weights), run.sitting()
    evaluator = Evaluator(context.config.task, context.config.sim, rows=evaluation.rows)
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
    evaluator: Evaluator,
    store: WeightStore,
    version: int,
    episodes: int,
    final: bool,
) -> bool:
    """Evaluate one version; False if the last weights came meanwhile and it was given up."""
    from policies.checkpoint import policy_from_state

    run = context.run
    arrays, manifest = store.load(version)
    step = int(manifest.metadata["step"])
    results = evaluator.run(
        policy_from_state(manifest.config, arrays),
        version,
        range(episodes),
        films=build.film_paths(run, range(context.config.evaluation.videos), f"step{step:07d}"),
        keep_going=_unless_final(context, store, version),
    )
    if len(results) < episodes:
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


ROLES: dict[str, Callable[[Context], None]] = {
    "buffer": buffer_role,
    "actor": actor_role,
    "learner": learner_role,
    "evaluator": evaluator_role,
}


def main() -> int:
    """Entry of a role process: role name, run directory, socket directory, supervisor's pid."""
    role, path, socket_dir, supervisor_pid = sys.argv[1:5]
    die_with_parent(int(supervisor_pid))
    context = Context(role, RunDir(Path(path)), socket_dir, int(supervisor_pid))
    try:
        ROLES[role.rstrip("0123456789")](context)
    except Stop:
        return STOPPED
    except (LinkError, DeviceLostError) as error:
        sys.stderr.write(f"{role}: {error}\n")
        return 1
    except EmbodiedError as error:
        sys.stderr.write(f"{role}: {type(error).__name__}: {error}\n")
        with contextlib.suppress(StorageFullError):
            context.run.event("role failed", role=role, error=str(error))
        return FAILED
    finally:
        context.pulse.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
