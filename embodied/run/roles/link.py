"""The role that keeps a robot host's link: experience goes up, weights and chunks come down."""

import time

from embodied.run.context import Context
from embodied.run.site.config import read_site
from embodied.run.site.hostlink import HostLink
from embodied.run.site.metrics import serve_metrics
from embodied.run.site.status import write_status

_LOOK_S = 0.5
_IDLE_S = 0.01


def link_role(context: Context) -> None:
    """Serve until the run is over and all is delivered, or told to end."""
    run = context.run
    site = read_site(run)
    assert site is not None
    link = HostLink(run, site, context.socket_dir)
    looked_s = 0.0
    try:
        with serve_metrics(site.config.metrics_port, run.path):
            while not link.done:
                busy = link.pump()
                now_s = time.monotonic()
                if now_s - looked_s > _LOOK_S:
                    looked_s = now_s
                    status = link.status()
                    write_status(run.path, status)
                    [host] = status.hosts
                    context.pulse.note(
                        over=status.over,
                        version=status.version,
                        fault=link.fault or None,
                        spooled=host.spool_steps,
                    )
                context.check(state="linked" if link.connected else "no link")
                if not busy:
                    time.sleep(_IDLE_S)
    finally:
        link.close()
