"""embodied compose, end to end on the point mass: behaviour, not performance."""

import json
import shutil

import msgspec
import numpy as np
import pytest

from embodied.cli.main import main
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.core.specs import DeviceSpec
from embodied.run.compose import tunable, weighted
from embodied.run.observing import check_robot
from embodied.weights.store import WeightStore
from policies.checkpoint import load_policy, policy_from_state, policy_state, save_policy
from sim.family import EVALUATION_SEEDS, SimTask

FAST = [
    "task=pointmass",
    "run.mode=lockstep",
    "algorithm=bc",
    "actors.speed=0",
    "demonstrations.episodes=8",
    "policy.n_obs_steps=1",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "+policy.network.width=64",
    "+policy.network.depth=1",
    "learner.batch_size=64",
    "learner.steps=300",
    "learner.steps_per_round=60",
    "learner.learning_rate=0.003",
    "learner.ema_decay=0.95",
    "learner.warmup_steps=10",
    "evaluation.episodes=0",
    "evaluation.final_episodes=0",
    "evaluation.videos=0",
]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    for policy, seed in (("flow", 0), ("diffusion", 1)):
        out = f"run.dir={folder / policy}"
        assert main(["train", *FAST, out, f"policy={policy}", f"seed={seed}"]) == 0
    return folder


def compose(parents, output, *extra):
    members = f"policies=[{parents / 'flow'},{parents / 'diffusion'}]"
    return main(["compose", members, f"output={output}", "episodes=6", "rows=3", *extra])


def results(output):
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def searched(parents, tmp_path_factory):
    output = tmp_path_factory.mktemp("search") / "out"
    search = "search={name: bandit, steps: 2, first_episodes: 2}"
    assert compose(parents, output, search, f"demonstrations={parents / 'flow'}") == 0
    return output


def test_weights_are_chosen_on_search_seeds_and_reported_on_fresh_ones(searched):
    found = results(searched)
    assert sum(found["weights"]) == pytest.approx(1)
    assert found["weights"] in [row["weights"] for row in found["tried"]] or (
        np.abs(np.array([r["weights"] for r in found["tried"]]) - found["weights"]).max(1).min()
        < 1e-5
    )
    assert set(found["contenders"]) == {"composed", "flow", "diffusion"}
    assert all(row["episodes"] == 6 for row in found["contenders"].values())
    assert found["better_parent"] in ("flow", "diffusion")
    assert found["gain_interval"][0] <= found["gain"] <= found["gain_interval"][1]
    rows = RunDir(searched).read("metrics", "episodes")
    report = {r["result"]["seed"] for r in rows if r["contender"].startswith("report")}
    search = {r["result"]["seed"] for r in rows if not r["contender"].startswith("report")}
    assert report == set(range(6)) and min(search) >= EVALUATION_SEEDS
    assert len({(r["contender"], r["result"]["seed"]) for r in rows}) == len(rows)
    assert "<svg" in (searched / "weights.svg").read_text()


def test_the_analytic_weights_are_a_start_of_the_search(searched):
    found = results(searched)
    assert sum(found["analytic_weights"]) == pytest.approx(1)
    tried = np.array([row["weights"] for row in found["tried"]])
    assert np.abs(tried - found["analytic_weights"]).max(1).min() < 1e-5


def test_an_interrupted_search_goes_on_and_ends_the_same(parents, searched, tmp_path):
    """Cut anywhere, even in the middle of a line, nothing is played twice."""
    output = tmp_path / "again"
    search = "search={name: bandit, steps: 2, first_episodes: 2}"
    extra = [search, f"demonstrations={parents / 'flow'}"]
    assert compose(parents, output, *extra) == 0
    journal = output / "metrics" / "episodes.jsonl"
    whole = journal.read_bytes()
    expected = results(output)
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:20])
    (output / "results.json").unlink()
    assert compose(parents, output, *extra) == 0
    # Episodes are batched otherwise when some are there already: equal up to rounding.
    for found in (results(output), results(searched)):
        assert found["weights"] == expected["weights"]
        assert [t["weights"] for t in found["tried"]] == [t["weights"] for t in expected["tried"]]
        for name, row in expected["contenders"].items():
            assert found["contenders"][name]["successes"] == row["successes"]
            assert found["contenders"][name]["mean_ticks"] == pytest.approx(row["mean_ticks"])
    again = RunDir(output).read("metrics", "episodes")
    played = [(row["contender"], row["result"]["seed"]) for row in again]
    before = [msgspec.json.decode(line) for line in lines]
    assert len(set(played)) == len(played) == len(lines)
    assert set(played) == {(row["contender"], row["result"]["seed"]) for row in before}
    assert again[: len(lines) // 2] == before[: len(lines) // 2]


def test_the_composed_policy_is_a_policy_like_any_other(searched, tmp_path, capsys):
    for checkpoint in (searched, searched / "policy"):
        arguments = [f"checkpoint={checkpoint}", "task=pointmass", "episodes=6", "rows=3"]
        assert main(["eval", "--json", *arguments]) == 0
        evaluated = json.loads(capsys.readouterr().out)
        assert evaluated["successes"] == results(searched)["contenders"]["composed"]["successes"]
    policy = load_policy(searched / "policy")
    store = WeightStore(tmp_path / "weights")  # the way to robots
    config, arrays = policy_state(policy)
    store.publish(arrays, config, {"step": 0})
    delivered, manifest = store.load(store.latest_version())
    twin = policy_from_state(manifest.config, delivered)
    obs = {k: np.zeros((1, 1, *a.shape), np.float32) for k, a in policy.spec.observation.items()}
    np.testing.assert_array_equal(
        twin.act(None, obs, seed=np.array([3]))[1], policy.act(None, obs, seed=np.array([3]))[1]
    )


@pytest.mark.parametrize(
    ("operator", "extra"),
    [
        ("pooled", []),
        ("product", ["total=1.2", "search={name: grid, steps: 1, episodes: 2}"]),
        (
            "or",
            ["search={name: bayes, trials: 3, episodes: 2}", "solver={name: ddpm, num_steps: 8}"],
        ),
        ("and", ["solver={name: ddpm, num_steps: 8}"]),
        ("{name: cfg, unconditional: flow}", ["total=1.5"]),
    ],
)
def test_every_operator_runs(parents, tmp_path, operator, extra):
    assert compose(parents, tmp_path / "out", f"operator={operator}", *extra, "episodes=2") == 0
    assert results(tmp_path / "out")["contenders"]["composed"]["episodes"] == 2


def test_another_search_does_not_take_the_folder(parents, searched, capsys):
    assert compose(parents, searched, "search=grid") == 2
    assert "holds a search with another search, demonstrations" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_search_does_not_go_on_with_other_weights(parents, tmp_path, capsys):
    shutil.copytree(parents / "flow" / "policy", tmp_path / "flow")
    shutil.copytree(parents / "diffusion" / "policy", tmp_path / "diffusion")
    extra = ["search={name: grid, steps: 1, episodes: 1}", "task=pointmass"]
    assert compose(tmp_path, tmp_path / "out", *extra) == 0
    policy = load_policy(tmp_path / "flow")
    next(policy.parameters()).data.add_(0.1)
    save_policy(tmp_path / "flow", policy)
    assert compose(tmp_path, tmp_path / "out", *extra) == 2
    assert "another version of 'flow'" in " ".join(capsys.readouterr().err.split())


WRONG = [
    (["operator={name: mix, weights: [1, 0]}"], "operator.weights is what the search finds"),
    (["operator=mx"], "Did you mean 'mix'"),
    (["search=grd"], "Did you mean 'grid'"),
    (["operator=and"], "solver={name: ddpm}"),
    (["search=analytic"], "demonstrations"),
    (["labels=[a]"], "labels names 1 policies, policies has 2"),
    (["labels=[a,a]"], "two policies are called"),
    (["labels=[a,composed]"], "'composed' is what the composition is called"),
    (["metric=coverage", "search=grid"], "has the signals"),
    (["episodes=0"], "episodes is 0"),
    (["first_seed=-1"], "evaluation seeds lie in"),
    (["task=metaworld/assembly"], "policy 'flow'"),
    (["demonstrations=/nowhere"], "neither a buffer's folder nor a run's"),
    (["policies=[/nowhere,/nowhere2]"], "neither a policy folder nor a run directory"),
]


@pytest.mark.parametrize(("extra", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_input(parents, tmp_path, capsys, extra, message):
    assert compose(parents, tmp_path / "out", *extra) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_camera_is_named_with_its_policy(searched):
    composed = load_policy(searched / "policy")
    robot = DeviceSpec(observation={}, action=composed.spec.action, tick_hz=10.0)
    label = next(iter(composed.parts()))
    with pytest.raises(ConfigError, match=rf"policy '{label}' reads observation '.*'pointmass'"):
        check_robot("policy", composed, robot, SimTask("pointmass", "", 10), goals=False)


def test_points_become_options():
    w = np.array([0.25, 0.75])
    assert weighted({"name": "mix"}, "ab", w, 1.0)["weights"] == [0.25, 0.75]
    assert weighted({"name": "product"}, "ab", w, 2.0)["weights"] == [0.5, 1.5]
    assert weighted({"name": "or"}, "ab", w, 1.0)["offsets"] == pytest.approx(np.log(w).tolist())
    assert tunable({"name": "cfg", "unconditional": "b"}, ("a", "b", "c")) == ("a", "c")
    assert tunable({"name": "and"}, ("a", "b")) == ()
