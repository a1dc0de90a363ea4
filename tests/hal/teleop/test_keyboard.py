"""The keyboard on a real (pseudo-)terminal, in a process of its own."""

import os
import signal
import sys
import time

import pytest
from follower import FOLLOWER_SPEC
from terminal import Terminal

from embodied.core.errors import ConfigError
from hal.teleop.keyboard import Keyboard, KeyboardConfig, foreground_terminal

HEAD = """
import os, signal, sys, time
for number in (signal.SIGHUP, signal.SIGQUIT):  # ignored where the tests run in the background
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {support!r})
import numpy as np
from follower import FOLLOWER_SPEC
from hal.teleop.keyboard import Keyboard, KeyboardConfig
from hal.teleop.asking import PersonStopped

def say(text):
    sys.stdout.write(text + "\\n")
    sys.stdout.flush()

keyboard = Keyboard(KeyboardConfig())
keyboard.begin(FOLLOWER_SPEC)
keyboard.open()
say("ready")
"""

LOOP = """
at = {"observation.state": np.zeros(3, np.float32)}
engaged = False
while True:
    action = keyboard.read(at)
    if (action is not None) != engaged:
        engaged = action is not None
        say("engaged" if engaged else "let go")
    if action is not None and action[0] > 0.05:
        say("moved up")
    for event in keyboard.events():
        say(f"event {event}")
    time.sleep(0.02)
"""


@pytest.fixture
def run():
    started = []

    def start(body):
        head = HEAD.format(support=os.path.join(os.getcwd(), "tests", "support"))
        started.append(Terminal([sys.executable, "-c", head + body]))
        started[-1].wait("ready")
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


def test_keys_move_signal_and_let_go(run):
    terminal = run(LOOP)
    assert not terminal.cooked
    terminal.hold("q", 0.5)
    terminal.wait("moved up")
    terminal.wait("let go")
    terminal.keys("\x1b[A")
    for key, event in (("\r", "success"), ("x", "failure"), ("u", "rerecord"), (" ", "estop")):
        terminal.keys(key)
        terminal.wait(f"event {event}")
    assert "event stop" not in terminal.output
    terminal.keys("\t")
    terminal.until(lambda: terminal.output.count("engaged") == 2, "takeover")
    terminal.keys("\x1b")
    terminal.wait("event stop")
    terminal.until(lambda: terminal.output.count("let go") == 2, "end of the takeover")
    assert "q" not in terminal.output.replace("moved", ""), "keys are not echoed"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("keyboard.close(); keyboard.close()", 0),
        ("raise RuntimeError('bug')", 1),
        ("sys.exit(3)", 3),
        ("time.sleep(30)", "SIGINT"),
        ("time.sleep(30)", "SIGTERM"),
        ("time.sleep(30)", "SIGHUP"),
        ("time.sleep(30)", "SIGQUIT"),
    ],
)
def test_the_terminal_gets_its_mode_back_whatever_happens(run, body, status):
    terminal = run(body)
    if isinstance(status, str):
        number = getattr(signal, status)
        if status == "SIGINT":
            terminal.keys("\x03")
        else:
            terminal.signal(number)
        status = -number
    assert terminal.end() == status
    assert terminal.restored, terminal.output


def test_asking_waits_for_enter_and_ends_with_escape(run):
    terminal = run("""
keyboard.say = say
keyboard.ask("Ready?")
say("first answer")
try:
    keyboard.ask("And now?")
except PersonStopped as stopped:
    say(f"stopped by {stopped.event}")
""")
    terminal.wait("Ready?")
    terminal.keys("qx")
    time.sleep(0.1)
    assert "first answer" not in terminal.output
    terminal.keys("\n")
    terminal.wait("first answer")
    terminal.wait("And now?")
    terminal.keys("\x1b")
    terminal.wait("stopped by stop")
    assert terminal.end() == 0 and terminal.restored


def test_a_terminal_that_is_gone_is_a_stop(run, tmp_path):
    told = tmp_path / "told"
    terminal = run(f"""
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
while True:
    if "stop" in keyboard.events():
        open({str(told)!r}, "w").close()
        break
    time.sleep(0.01)
""")
    terminal.hang_up()
    terminal.until(told.exists, "stop")


def test_in_the_background_it_does_not_touch_the_terminal(run):
    terminal = run("""
keyboard.close()
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    try:
        keyboard.open()
    except Exception as error:
        os.write(2, f"child: {error}\\n".encode())
    os._exit(0)
os.waitpid(child, 0)
""")
    terminal.wait("runs in the background of its terminal")
    assert terminal.end() == 0 and terminal.restored


def test_without_a_terminal_it_says_so(tmp_path):
    with (tmp_path / "file").open("w") as file:
        assert "not a terminal" in foreground_terminal(file.fileno())
        with pytest.raises(ConfigError, match="not a terminal; run it in a terminal"):
            Keyboard(KeyboardConfig(), file.fileno()).open()


def test_the_help_names_keys_and_joints():
    keyboard = Keyboard(KeyboardConfig())
    keyboard.begin(FOLLOWER_SPEC)
    assert keyboard.help.startswith("q/a 0 w/s 1 e/d 2")
