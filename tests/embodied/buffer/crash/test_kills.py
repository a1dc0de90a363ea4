"""A process that dies at any moment: the next one finds everything that it had appended."""

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from aftermath import check, read
from disk import InterruptedStorage, restore, whole_files_through
from sizes import size
from story import Story, check_steps, make_step, tell

from embodied.buffer.write.retention import Retention

OPTIONS = {
    "segment_bytes": 3000,
    "chunk_rows": 2,
    "retention": Retention(max_bytes=7000, pinned=("demo",)),
}
SUPPORT = str(Path(__file__).parents[3] / "support")


class Crash(BaseException):
    pass


def die():
    raise Crash


def tell_until(path, n, torn, interrupt=die):
    """The story until its n-th operation, and whether it was told to its end."""
    story = Story(path, InterruptedStorage(path, n, torn, interrupt), **OPTIONS)
    with whole_files_through(story.storage):
        try:
            tell(story, seed=4, n_episodes=5)
        except Crash:
            story.kill()
            return story, False
    return story, True


def revive(story):
    """The process is started again on the same disk, as if nothing had happened to that."""
    dead = story.storage
    for name in dead.CHANGES:
        delattr(dead, name)
    with whole_files_through(dead):
        story.open()
        story.flush()
        for step in list(story.steps.values()):
            story.append(step)
        story.flush()
        story.close()


def crash_at(path, n, torn, power, counts):
    """Crash at the n-th operation; False if the story is told before. power: it goes, too, a while
    after the process was started again."""
    rng = random.Random(n)
    story, ended = tell_until(path, n, torn)
    if not ended and (story.storage.tore or not torn):
        at = story.storage.position
        if power:
            revive(story)
            at = rng.randint(at, story.storage.position)
            image = story.storage.image(at, rng)
            shutil.rmtree(path)
            restore(path, image)
        check(path, story, at, rng, counts)
        counts["crashes"] += 1
    shutil.rmtree(path, ignore_errors=True)
    return not ended


def kinds_of_operations(path):
    story, ended = tell_until(path, 1 << 30, False)
    assert ended
    kinds = Counter(op.kind for op in story.storage.ops)
    assert kinds.keys() == {op.replace("_data", "") for op in story.storage.CHANGES}
    return dict(kinds)


def test_a_crash_at_many_operations(ram_path, report):
    counts, n = Counter(), 1
    while crash_at(ram_path / "log", n, n % 4 == 0, n % 2 == 0, counts):
        n += 3
    report(f"crashes at operations {kinds_of_operations(ram_path / 'whole')}: {dict(counts)}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_crash_at_each_operation(ram_path, report):
    counts, n = Counter(), 1
    while crash_at(ram_path / "log", n, False, False, counts):
        for torn, power in ((False, True), (True, False), (True, True)):
            crash_at(ram_path / "log", n, torn, power, counts)
        n += 1
    report(f"crashes at operations {kinds_of_operations(ram_path / 'whole')}: {dict(counts)}")


KILL_AT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_kills
for number, n in enumerate(map(int, sys.argv[4].split(","))):
    pid = os.fork()
    if pid == 0:
        place, torn = Path(sys.argv[3]) / str(n), bool(number % 2)
        test_kills.tell_until(place, n, torn, lambda: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, n
"""


def segments(path):
    """Contents of the segments; sizes of their side files, whose order is not always the same."""
    side = {file.name: file.stat().st_size for file in path.glob("*.cols*")}
    return side | {file.name: file.read_bytes() for file in path.glob("*.seg*")}


def kill_at(path, points, report):
    counts = Counter()
    command = [sys.executable, "-c", KILL_AT, SUPPORT, str(Path(__file__).parent)]
    subprocess.run([*command, str(path / "killed"), ",".join(map(str, points))], check=True)
    for number, n in enumerate(points):
        torn = bool(number % 2)
        place, twin = path / "killed" / str(n), path / "twin"
        story, _ = tell_until(twin, n, torn)
        assert segments(place) == segments(twin)  # so what is true of crashes is true of kills
        check(place, story, story.storage.position, random.Random(n), counts)
        counts["kills"] += 1
        shutil.rmtree(place)
        shutil.rmtree(twin)
    report(f"SIGKILL at operations: {dict(counts)}")


def test_sigkill_at_some_operations(ram_path, report):
    kill_at(ram_path, (1, 17, 40, 77, 101), report)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigkill_at_each_operation(ram_path, report):
    story, _ = tell_until(ram_path / "whole", 1 << 30, False)
    kill_at(ram_path, range(1, story.storage.position + 1), report)


APPEND = """
import os, random, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from story import CODECS, make_step
from embodied.buffer.write.writer import ReplayWriter
writer = ReplayWriter(Path(sys.argv[2]), 30_000, codecs=CODECS, chunk_rows=2)
rng = random.Random(int(sys.argv[3]))
next_up = {stream: [writer.next_episode(stream), 0, rng.randint(1, 9)] for stream in ("a", "force")}
os.write(1, b"up\\n")
done = []
while True:
    for _ in range(rng.randint(1, 8)):
        stream = rng.choice(list(next_up))
        episode, index, length = state = next_up[stream]
        writer.append(make_step(stream, episode, index, index == length))
        done.append(f"{stream} {episode} {index} {int(index == length)}")
        state[:] = episode, index + 1, length
        if index == length:
            state[:] = episode + 1, 0, rng.randint(1, 9)
    if rng.random() < 0.02:
        writer.close()
        writer = ReplayWriter(Path(sys.argv[2]), 30_000, codecs=CODECS, chunk_rows=2)
    writer.flush()
    os.write(1, ("\\n".join(done) + "\\n.\\n").encode())
    done = []
"""


def kill_at_random(path, count, report):
    counts = Counter()
    known, acknowledged = {}, set()
    for trial in range(count):
        if trial % 25 == 0:
            shutil.rmtree(path / "log", ignore_errors=True)
            known, acknowledged = {}, set()
        command = [sys.executable, "-c", APPEND, SUPPORT, str(path / "log"), str(trial)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"up\n"
            time.sleep(random.Random(trial).uniform(0, 0.2))
            child.kill()
            said = child.stdout.read().decode()
        for commit in said.split(".\n")[:-1]:
            for line in commit.splitlines():
                stream, episode, index, final = line.split()
                key = stream, int(episode), int(index)
                known[key] = make_step(*key, final == "1")
                acknowledged.add(key)
        found, _ = read(path / "log")
        assert found.keys() >= acknowledged
        for key in found.keys() - known.keys():  # appended, but the kill came before the answer
            known[key] = make_step(*key, found[key].final)
            counts["not acknowledged"] += 1
        check_steps(found, known)
        counts["kills"] += 1
    counts["acknowledged at the end"] = len(acknowledged)
    counts["segments"] = len(list((path / "log").glob("*.seg*")))
    report(f"SIGKILL at random: {dict(counts)}")
    assert counts["segments"] > 5


def test_sigkill_at_random(ram_path, report):
    kill_at_random(ram_path, 6, report)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigkill_at_random_many_times(ram_path, report):
    kill_at_random(ram_path, size(200, 30), report)
