"""The role that writes a run's replay log, or a robot host's spool."""

import msgspec

from embodied.buffer.serve.service import BufferService
from embodied.run.context import Context
from embodied.run.site.config import read_site
from embodied.run.telemetry import address


def buffer_role(context: Context) -> None:
    """The one writer of the log. A spool deletes only what the learner's site has acknowledged."""
    buffer, retention = context.config.buffer, context.config.buffer.retention
    if retention is not None and read_site(context.run) is not None:
        retention = msgspec.structs.replace(retention, acknowledged_only=True)
    service = BufferService(
        context.run.buffer,
        address(context.socket_dir, "buffer"),
        segment_bytes=buffer.segment_mib << 20,
        retention=retention,
    )
    try:
        while True:
            service.poll(0.2)
            context.check(state="serving")
    finally:
        service.close()
