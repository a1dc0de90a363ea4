"""The role that keeps the links of a run's hosts, where the learner is."""

import time

from embodied.run.context import Context, Stop
from embodied.run.site.gateway import Gateway
from embodied.run.site.metrics import serve_metrics
from embodied.run.site.status import write_status

_LOOK_S = 0.5
_DRAIN_S = 10.0


def gateway_role(context: Context) -> None:
    """Serve until told to end; then wait for what hosts still have to deliver."""
    run, options = context.run, context.config.gateway
    gateway = Gateway(run, context.config, context.socket_dir)
    run.event("gateway listens", address=gateway.address)
    try:
        with serve_metrics(options.metrics_port, run.path):
            try:
                while True:
                    _look(context, gateway)
                    context.check()
                    time.sleep(_LOOK_S)
            except Stop:
                until_s = time.monotonic() + _DRAIN_S
                while gateway.over and not gateway.drained and time.monotonic() < until_s:
                    _look(context, gateway)
                    time.sleep(_LOOK_S)
                raise
    finally:
        gateway.close()


def _look(context: Context, gateway: Gateway) -> None:
    status = gateway.look()
    write_status(context.run.path, status)
    connected = [host for host in status.hosts if host.connected]
    context.pulse.note(
        state="over" if status.over else "serving",
        hosts=len(connected),
        spooled=sum(host.spool_steps for host in connected),
    )
