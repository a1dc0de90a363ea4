"""The role that decides for robots of other hosts, where the learner is."""

import time

from embodied.run.context import Context
from embodied.run.serving.process import ServeConfig, serve
from embodied.run.serving.server import BatchingConfig, PolicyServer
from embodied.run.telemetry import address
from embodied.weights.store import WeightStore

_WAIT_S = 0.2
_TELL_S = 1.0


def policy_role(context: Context) -> None:
    """Serve the run's newest weights, from the first on, to those who ask through the gateway."""
    store = WeightStore(context.run.weights)
    while store.latest_version() is None:
        context.check(state="waiting for weights")
        time.sleep(_WAIT_S)
    config = ServeConfig(
        checkpoint=str(context.run.path),
        listen=address(context.socket_dir, "policy"),
        follow=True,
        report_s=10.0,
        batching=BatchingConfig(rows=8, max_wait_ms=3.0, max_queued=64),
        inference=context.config.inference,
    )

    told_s = 0.0

    def note(server: PolicyServer) -> None:
        nonlocal told_s
        context.check()
        if time.monotonic() - told_s < _TELL_S:
            return
        told_s, health = time.monotonic(), server.health()
        context.pulse.note(
            state="serving" if health.ready else "warming up",
            version=health.version,
            decided=health.decided,
            fault=health.fault or None,
        )

    serve(config, lambda: True, note)
