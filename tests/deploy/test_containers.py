"""The container files, as far as they can be held to something without running them."""

import re
import string
from pathlib import Path

import pytest
import yaml

from deploy.wheel import constraints
from embodied.core.config import compose
from embodied.run.gateway_options import GatewayConfig

ROOT = Path(__file__).parents[2]


def test_the_learners_side_opens_one_port_and_passes_what_train_knows():
    [learner] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"].values()
    assert (
        ROOT / "deploy" / learner["build"]["context"] / learner["build"]["dockerfile"]
    ).is_file()
    words = [re.sub(r"\$\{TASK:[^}]*\}", "so101/reach", word) for word in learner["command"]]
    own = [word for word in words if not word.startswith("gateway.")]
    assert compose("train", own)["task"] == "so101/reach"
    gateway = dict(word.removeprefix("gateway.").split("=") for word in words if word not in own)
    assert set(gateway) <= set(GatewayConfig.__struct_fields__)
    [port] = learner["ports"]
    assert gateway["listen"].endswith(":" + port.split(":")[1])
    assert "privileged" not in learner and learner["cap_drop"] == ["ALL"]
    assert not re.search(r"\$\$?[^$@{]", string.Template(" ".join(words)).safe_substitute())


@pytest.mark.parametrize("name", ["Containerfile", "Containerfile.host"])
def test_images_are_not_run_by_root_and_hold_the_locks_versions(name):
    text = (ROOT / "deploy" / name).read_text()
    assert re.search(r"^USER embodied$", text, re.MULTILINE)
    assert re.findall(r"^FROM (.*)$", text, re.MULTILINE) == ["python:3.11-slim"]
    [script] = re.findall(r"sed -E '([^']*)'", text)
    hashes, backslash = script.split("; ")
    assert hashes == "/^ +--hash=/d" and backslash == r"s/ *\\$//"
    lock = (ROOT / "requirements.lock").read_text()
    lines = [re.sub(r" *\\$", "", x) for x in lock.splitlines() if not re.match(" +--hash=", x)]
    assert lines == constraints(None).splitlines()
