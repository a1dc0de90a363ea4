"""The role that acts."""

import time
from typing import Any

from embodied.buffer.serve.client import BufferClient
from embodied.core.processes import give_way, leave_cores
from embodied.run import build
from embodied.run.context import Context
from embodied.run.site.config import read_site
from embodied.run.site.freshness import EpisodeGate
from embodied.run.telemetry import address
from embodied.weights.store import WeightStore

_POLL_S = 0.2
_REPORT_S = 2.0
_IDLE_S = 0.05
_NICENESS = 5


def actor_role(context: Context) -> None:
    """Robots that act; their steps go to the buffer, weights come between chunks."""
    from embodied.run.actor import Actor
    from embodied.run.lockstep import result_row

    run, config = context.run, context.config
    site = read_site(run)
    results: list[Any] = []
    actor: Actor | None = None

    def on_result(result: Any) -> None:
        results.append(result)
        run.metrics(context.role, result_row(result))

    def meanwhile() -> None:
        context.check(person=actor.person if actor else None)

    codecs = config.buffer.codecs
    with BufferClient(
        address(context.socket_dir, "buffer"),
        context.role,
        codecs=codecs,
        over=lambda: context.orphaned,  # the buffer's service ends with the supervisor
    ) as sink:
        actor = Actor(
            config,
            context.index,
            sink,
            WeightStore(run.weights),
            on_result,
            # When weights were published elsewhere, this host's clock does not tell.
            sitting=run.sitting() if site is None else 0,
            speed=config.actors.speed,
            holder=f"{run.path.name}/{context.role}",
            host="" if site is None else site.name,
            background=True,
            refusal=None if site is None else EpisodeGate(run, site.config.staleness).refusal,
            meanwhile=meanwhile,
        )
        try:
            actor.recall(build.make_reader(run, config))
            if config.actors.devices is None:  # simulated robots wait for it, real ones do not
                give_way(_NICENESS)
            simulated_here = config.actors.devices is None and site is None
            cores = config.learner.threads if simulated_here else 0
            _act(context, actor, sink, results, cores)
        finally:
            try:
                sink.flush()
            finally:
                actor.close()


def _act(context: Context, actor: Any, sink: BufferClient, results: list[Any], cores: int) -> None:
    """cores: to be left to the learner from the first weights on, when it has begun."""
    run = context.run
    started_s, ticks, polled_s = time.monotonic(), 0, 0.0
    ages_s: list[float] = []
    rollouts_s: list[float] = []
    waiting = False
    while True:
        if time.monotonic() - polled_s > _POLL_S:
            polled_s = time.monotonic()
            acted = actor.published_ns
            if actor.poll_weights() and acted:  # the first weights may have been there for long
                rollouts_s.append((time.monotonic_ns() - actor.published_ns) / 1e9)
            context.check(
                episodes=len(results),
                demonstrating=actor.demonstrating,
                version=actor.version,
                person=actor.person or None,
                stopped=actor.stopped,
                fault=str(sink.last_error)
                if sink.last_error and sink.unacknowledged
                else actor.waiting or actor.fault or None,
            )
        if cores and actor.version >= 0:
            leave_cores(cores)
            cores = 0
        decisions, losses, stopped = len(actor.latencies_s), actor.losses, actor.stopped
        actor.tick()
        if actor.losses > losses:
            run.event("device lost", role=context.role, error=actor.fault)
        if actor.stopped and not stopped:
            run.event("stopped by the person", role=context.role)
        if bool(actor.waiting) != waiting:
            waiting = bool(actor.waiting)
            what = "episodes wait" if waiting else "episodes go on"
            run.event(what, role=context.role, reason=actor.waiting)
        if len(actor.latencies_s) > decisions and actor.published_ns:
            ages_s.append((time.monotonic_ns() - actor.published_ns) / 1e9)
        if actor.idle:
            sink.flush()
            context.check()
            time.sleep(_IDLE_S)
        elapsed_s = time.monotonic() - started_s
        if elapsed_s >= _REPORT_S:
            rate = (actor.ticks - ticks) / elapsed_s
            row: dict[str, Any] = {
                "steps_per_s": rate,
                "unacknowledged": sink.unacknowledged,
                "rejected": actor.rejected,
                "rollout_s": [round(x, 3) for x in rollouts_s],
            }
            if actor.latencies_s:
                row["latency_ms"] = [round(1e3 * x, 3) for x in actor.latencies_s]
                row["weight_age_s"] = [round(x, 3) for x in ages_s]
            run.timings(context.role, row)
            context.check(steps_per_s=rate)
            started_s, ticks = time.monotonic(), actor.ticks
            actor.latencies_s.clear()
            ages_s.clear()
            rollouts_s.clear()
