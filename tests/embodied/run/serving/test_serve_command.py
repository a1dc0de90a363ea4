"""embodied serve, and the commands that let it decide."""

import json
import signal
import subprocess
import sys

import pytest
from served import stored

from embodied.cli.main import main
from embodied.core.errors import ConfigError, LinkError
from embodied.run.build import deciding_policy
from embodied.run.config import load_train
from policies.acting import InferenceConfig

EMBODIED = [sys.executable, "-m", "embodied.cli.main"]
SERVER = ["batching.rows=4", "report_s=0.1"]
pytestmark = pytest.mark.alone


@pytest.fixture
def served(tmp_path):
    """Starts `embodied serve`; what it says is in its log."""
    started = []

    def start(checkpoint, *overrides):
        address = f"ipc://{tmp_path}/p.sock"
        command = [*EMBODIED, "serve", f"checkpoint={checkpoint}", f"listen={address}", *SERVER]
        with (tmp_path / "serve.log").open("a") as log:
            started.append(
                subprocess.Popen([*command, *overrides], stdout=log, stderr=subprocess.STDOUT)
            )
        return address, started[-1], tmp_path / "serve.log"

    yield start
    for process in started:
        process.kill()
        process.wait(20)


def test_what_contradicts_itself_is_refused(tmp_path):
    def refused(path=None, version=None, **inference):
        with pytest.raises((ConfigError, LinkError)) as error:
            deciding_policy(path, InferenceConfig(**inference), rows=1, version=version)
        return str(error.value)

    assert "name who decides" in refused()
    assert "leave checkpoint null" in refused(tmp_path, remote="ipc:///nowhere")
    assert "checkpoint to the policy" in refused(remote="ipc:///nowhere", fallback=True)
    assert "name a policy server" in refused(fallback=True)
    assert "is chosen there" in refused(version=3, remote="ipc:///nowhere")
    assert "'nowhere' is unknown" in refused(remote="nowhere")
    said = refused(remote="ipc:///nowhere", patience_s=0.01)
    assert "no answer from ipc:///nowhere" in said and "embodied serve checkpoint" in said
    with pytest.raises(ConfigError, match="a policy server does not"):
        load_train(["task=pointmass", "run.mode=lockstep", "inference.remote=ipc:///nowhere"])


def test_the_command_says_what_is_wrong_with_its_checkpoint(capsys, tmp_path):
    assert main(["serve", "checkpoint=/nowhere", f"listen=ipc://{tmp_path}/s"]) == 2
    assert "neither a policy folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_an_evaluation_of_a_served_policy_is_that_of_the_policy(served, tmp_path):
    folder = stored(tmp_path / "policy")
    address, server, log = served(folder, "batching.rows=1")
    found = {}
    for name, who in (("here", f"checkpoint={folder}"), ("served", f"inference.remote={address}")):
        options = ["task=pointmass", "episodes=4", "rows=1", f"output={tmp_path / name}"]
        options += ["inference.patience_s=240"]
        subprocess.run([*EMBODIED, "eval", who, *options], check=True, timeout=240)
        found[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    assert found["served"] == found["here"]
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0
    said = log.read_text()
    assert f"ready at {address}" in said and "rows a batch" in said
