"""The processes between an actor and a learner's buffer, as children of one that has imported all.

Its argument is a folder. For each line of its input, a role, it kills that role's process if there
is one, starts it again, and answers with its pid.
"""

import os
import signal
import sys
import time
from pathlib import Path

from embodied.buffer.serve.messages import REPLIES
from embodied.buffer.serve.service import BufferService
from embodied.buffer.spool.messages import UPLOAD_REPLIES, UPLOADS
from embodied.buffer.spool.receiver import Receiver
from embodied.buffer.spool.uploader import Uploader
from embodied.buffer.write.retention import Retention
from embodied.comms.channels import RequestClient, RequestServer
from embodied.core.processes import die_with_parent

SPOOLED = Retention(max_bytes=1 << 18, acknowledged_only=True)
SEGMENT_BYTES = 1 << 15


def run(role: str, folder: Path) -> None:
    """What the process of this role does."""
    if role == "spool":
        address = f"ipc://{folder}/s"
        service = BufferService(folder / "spool", address, SEGMENT_BYTES, SPOOLED)
        service.serve(lambda: False)
    elif role == "learner":
        service = BufferService(folder / "learner", f"ipc://{folder}/b", SEGMENT_BYTES)
        service.serve(lambda: False)
    elif role == "gateway":
        receiver = Receiver("robot-1", RequestClient(f"ipc://{folder}/b", REPLIES), timeout_s=0.5)
        server = RequestServer(f"ipc://{folder}/g", UPLOADS, receiver.handle)
        while True:
            server.poll(0.1)
    else:
        link = RequestClient(f"ipc://{folder}/g", UPLOAD_REPLIES)
        uploader = Uploader(folder / "spool", link, "robot-1", batch_bytes=1 << 11, resend_s=0.5)
        while True:
            if not uploader.pump():
                link.wait(0.01)
                time.sleep(0.001)


def main() -> None:
    children: dict[str, int] = {}
    for line in sys.stdin:
        role = line.strip()
        if role in children:
            os.kill(children[role], signal.SIGKILL)
            _, status = os.waitpid(children[role], 0)
            assert os.WIFSIGNALED(status), f"{role} had ended by itself"
        children[role] = os.fork()
        if children[role] == 0:
            die_with_parent(os.getppid())
            run(role, Path(sys.argv[1]))
        sys.stdout.write(f"{children[role]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
