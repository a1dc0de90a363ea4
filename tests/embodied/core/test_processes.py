"""A child whose parent dies before it could ask to die with it."""

import ast
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = """
import sys, time
from pathlib import Path
from embodied.core.processes import die_with_parent
time.sleep(float(sys.argv[2]))
die_with_parent(int(sys.argv[1]))
Path(sys.argv[3]).touch()
time.sleep(60)
"""

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), *sys.argv[2:4]])
sys.stdout.write(f"{child.pid}\\n")
sys.stdout.flush()
while sys.argv[4] == "after" and not os.path.exists(sys.argv[3]):
    time.sleep(0.01)
os._exit(0)
"""

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def adopting():
    """This process adopts orphans, as an init of a container or a systemd session does."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.parametrize("dies", ["before", "after"])
def test_a_child_ends_with_its_parent_whenever_that_dies(adopting, tmp_path, dies):
    lived = tmp_path / "lived"
    asks_after_s = "0.5" if dies == "before" else "0"
    command = [sys.executable, "-c", PARENT, CHILD, asks_after_s, lived, dies]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.wait(10)
    deadline_s = time.monotonic() + 15
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) == signal.SIGTERM
    assert lived.exists() == (dies == "after")


def test_a_child_of_process_1_of_a_container_lives(tmp_path):
    """There the parent's number is 1, which is no sign of its death."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("this user may not make a process namespace")
    lived = tmp_path / "lived"
    script = "[ $$ = 1 ] && " + '"$0" -c "$1" 1 0 "$2" & ' + "sleep 4; kill $!"
    subprocess.run(
        [
            *("unshare", "--pid", "--fork", "--kill-child", "sh", "-c", script),
            *(sys.executable, CHILD.replace("time.sleep(60)", "time.sleep(20)"), str(lived)),
        ],
        check=False,
        cwd=Path(__file__).parents[3],
        timeout=20,
    )
    assert lived.exists()


GIVEN = """
import os
from pathlib import Path
from embodied.core.processes import give_way
give_way(7)
session = Path("/proc/self/autogroup")
given = session.read_text().split()[-1] if session.exists() else 7
print(os.getpriority(os.PRIO_PROCESS, 0), given)
"""


LEFT = """
import os, threading
from embodied.core.processes import leave_cores
end = threading.Event()
threading.Thread(target=end.wait, daemon=True).start()
leave_cores(%d)
print([sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")])
"""


@pytest.mark.parametrize("count", [1, 1000])
def test_all_threads_leave_the_last_cores_and_keep_one(count):
    cores = sorted(os.sched_getaffinity(0))
    script = [sys.executable, "-c", LEFT % count]
    found = ast.literal_eval(
        subprocess.run(script, check=True, capture_output=True).stdout.decode()
    )
    assert found == [cores[: max(1, len(cores) - count)]] * 2


def test_who_gives_way_does_so_to_other_sessions_too():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    command = [sys.executable, "-c", GIVEN]
    several = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=30)[0].split() for process in several]
    assert said == [[str(before + 7), "7"]] * 3
