import json

import numpy as np
import pytest

from embodied.cli.main import main
from embodied.weights.store import WeightStore
from embodied.weights.trial import Trial, TrialRule


@pytest.fixture
def store(tmp_path):
    made = WeightStore(tmp_path / "weights")
    for number in (1, 2, 3):
        made.publish({"w": np.full(9, number, np.float32)}, {"name": "flow"}, {"step": 10 * number})
    return made


def call(tmp_path, *words):
    return main(["weights", str(tmp_path), *words])


def rows(capsys):
    lines = capsys.readouterr().out.splitlines()[1:]
    return {int(line.split()[0]): " ".join(line.split()[1:]) for line in lines}


def test_list_says_what_acts_and_what_is_pinned(tmp_path, store, capsys):
    assert call(tmp_path) == 0
    found = rows(capsys)
    assert found[1].startswith("10 0.0 MB – " + store.manifest(1).sha256[:12])
    assert found[3].endswith("acting") and not found[2].endswith("acting")
    trial = Trial(store)
    trial.start(TrialRule(canaries=("a",), baseline_episodes=1))
    store.publish({"w": np.zeros(9, np.float32)}, {})
    trial.record(3, True)
    trial.advance()
    trial.record(4, True)
    (store.path / "versions" / "00000001.json").write_bytes(b"{}")
    assert call(tmp_path, "list") == 0
    found = rows(capsys)
    assert found[1] == "damaged" and found[3].endswith("yes acting")
    assert found[4].endswith("yes on trial: 1 of 1 succeeded")


def test_rollback_pin_and_unpin(tmp_path, store, capsys):
    assert call(tmp_path, "rollback", "1") == 0
    assert "again as version 4" in capsys.readouterr().out
    assert call(tmp_path, "pin", "2") == 0
    assert "as version 5" in capsys.readouterr().out
    assert call(tmp_path) == 0
    found = rows(capsys)
    assert found[5].endswith("yes held, 2 again") and found[4].endswith("1 again")
    assert call(tmp_path, "rollback", "1") == 2
    assert "2 is pinned; unpin it first" in capsys.readouterr().err
    assert call(tmp_path, "unpin", "3") == 2
    assert call(tmp_path, "unpin", "2") == 0
    assert Trial(store).offered("any") == 5 and store.pinned() == []


def test_show_prints_the_manifest_and_the_tensors(tmp_path, store, capsys):
    assert call(tmp_path, "show", "2") == 0
    shown = capsys.readouterr().out
    manifest, end = json.JSONDecoder().raw_decode(shown)
    assert manifest["version"] == 2 and manifest["metadata"] == {"step": 20}
    assert shown[end:].split()[4:] == ["w", "float32", "9", "36"]


def test_what_cannot_be_done_is_said(tmp_path, store, capsys):
    for words, text in (
        (("show", "77"), "version 77 is not in"),
        (("pin",), "pin which version"),
        (("list", "3"), "takes no version"),
    ):
        assert call(tmp_path, *words) == 2
        assert text in " ".join(capsys.readouterr().err.split())
    assert main(["weights", str(tmp_path / "nothing")]) == 2
    assert "no run was started there" in capsys.readouterr().err
