"""The deterministic engine on the point mass, through the command line's own entry."""

import json

import pytest

from embodied.buffer.read.replay import ReplayReader
from embodied.cli.main import main
from embodied.core.config import convert
from embodied.core.rundir import RunDir
from embodied.core.seeds import make_rng
from embodied.run.build import make_sampling
from embodied.run.config import TrainConfig
from embodied.weights.store import WeightStore

FAST = [
    "task=pointmass",
    "run.mode=lockstep",
    "actors.speed=0",
    "actors.ticks_per_round=100",
    "demonstrations.episodes=8",
    "policy.n_obs_steps=1",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "+policy.network.width=64",
    "+policy.network.depth=1",
    "learner.batch_size=64",
    "learner.steps=400",
    "learner.steps_per_round=50",
    "learner.publish_every=50",
    "learner.checkpoint_every=100",
    "learner.warmup_steps=10",
    "learner.learning_rate=0.003",
    "learner.ema_decay=0.95",
    "evaluation.episodes=4",
    "evaluation.final_episodes=8",
    "evaluation.every_steps=200",
    "evaluation.rows=4",
    "evaluation.videos=1",
    "buffer.segment_mib=1",
]


def train(path, *extra):
    return main(["train", *FAST, f"run.dir={path}", *extra])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("lockstep") / "run"
    assert train(path) == 0
    return RunDir(path)


def test_the_policy_learns_and_the_report_shows_it(finished):
    rows = finished.read("metrics", "evaluation")
    assert [row["final"] for row in rows] == [False, True]
    assert rows[-1]["success_rate"] >= 0.75
    assert rows[-1]["seeds"] == list(range(8))
    page = finished.report.read_text()
    assert "<svg" in page and "data:video/mp4;base64," in page and "/8 =" in page
    losses = [row["loss"] for row in finished.read("metrics", "learner")]
    assert losses[-1] < losses[0]


def test_two_runs_with_one_seed_write_the_same_metrics(finished, tmp_path):
    assert train(tmp_path / "again") == 0
    again = RunDir(tmp_path / "again")
    assert finished.streams("metrics") == again.streams("metrics")
    for stream in finished.streams("metrics"):
        name = f"metrics/{stream}.jsonl"
        assert (finished.path / name).read_bytes() == (again.path / name).read_bytes(), stream
    assert train(tmp_path / "other", "seed=1") == 0
    other = RunDir(tmp_path / "other").read("metrics", "learner")
    assert other != finished.read("metrics", "learner")


def test_dagger_records_corrections_with_the_version_that_acted(finished):
    reader = ReplayReader(finished.buffer)
    reader.refresh()
    episodes = reader.closed_episodes()
    demonstrations = [e for e in episodes if e.interventions == len(e.rows)]
    corrected = [e for e in episodes if 0 < e.interventions < len(e.rows)]
    assert len(demonstrations) >= 8 and corrected
    assert all(e.policy_versions[1] >= 1 for e in corrected)
    assert {e.task for e in episodes} == {"pointmass"}


def labelled(step):
    return step.observation["observation.state"].tobytes(), step.action.tobytes()


@pytest.mark.slow
def test_the_better_the_policy_the_fewer_interventions_and_their_steps_are_learned_from(tmp_path):
    watch = ("algorithm=hg_dagger", "demonstrations.episodes=4", "learner.steps=1000")
    quiet = ("evaluation.episodes=0", "evaluation.final_episodes=0", "evaluation.videos=0")
    assert train(tmp_path / "run", *watch, *quiet) == 0
    run = RunDir(tmp_path / "run")
    rows = [
        row
        for stream in ("actor0", "actor1")
        for row in run.read("metrics", stream)
        if not row["demonstration"]
    ]
    rows.sort(key=lambda row: row["version"])
    early, late = rows[: len(rows) // 4], rows[-(len(rows) // 4) :]
    helped = [sum(row["interventions"] > 0 for row in part) / len(part) for part in (early, late)]
    assert len(rows) >= 40 and helped[0] > 0.3 and helped[1] < 0.6 * helped[0], helped
    windows = [row["windows"] for row in run.read("metrics", "learner")]
    with ReplayReader(run.buffer) as reader:
        reader.refresh()
        sampler = make_sampling(convert(run.read_config(), TrainConfig), reader).sampler
        sampler.refresh()
        batch = sampler.sample(2000, make_rng(0))
        useful = [e for e in reader.finished() if e.success]
        corrected = [e for e in useful if 0 < e.interventions < len(e.rows)]
        labels = [
            {labelled(s) for e in part for s in reader.steps(e) if s.intervention}
            for part in (useful, corrected)
        ]
    drawn = {
        (state[-1].tobytes(), action[0].tobytes())
        for state, action in zip(batch["observation.state"], batch["action"], strict=True)
    }
    assert drawn <= labels[0] and len(drawn & labels[1]) > len(labels[1]) / 2
    assert windows[0] < windows[-1] <= sum(e.interventions for e in useful)


def test_filtered_cloning_learns_from_successes_alone_and_asks_no_expert(tmp_path):
    few = ("algorithm=filtered_bc", "learner.steps=200", "evaluation.episodes=0")
    assert train(tmp_path / "run", *few, "evaluation.final_episodes=0") == 0
    run = RunDir(tmp_path / "run")
    with ReplayReader(run.buffer) as reader:
        reader.refresh()
        episodes = list(reader.finished())
    own = [e for e in episodes if not e.interventions]
    assert {e.interventions == len(e.rows) for e in episodes if e.interventions} == {True}
    assert {e.success for e in own} == {True, False}
    windows = [row["windows"] for row in run.read("metrics", "learner")]
    learned = sum(len(e.rows) for e in episodes if e.success)
    demonstrated = sum(len(e.rows) for e in episodes if e.success and e.interventions)
    assert demonstrated < windows[-1] <= learned

    recorded = f"demonstrations.dataset={{name: recorded, path: {run.buffer}}}"
    later = (*few, "evaluation.final_episodes=0", "algorithm.online=false", recorded)
    source = ("demonstrations.source=dataset", "demonstrations.episodes=null")
    assert train(tmp_path / "later", *later, *source) == 0
    later = RunDir(tmp_path / "later")
    assert {row["windows"] for row in later.read("metrics", "learner")} == {learned}
    assert not later.read("metrics", "actor0")


def test_a_learner_that_demonstrations_keep_short_of_its_first_publication_goes_on(tmp_path):
    tight = ("learner.samples_per_insert=2", "learner.steps=30", "evaluation.episodes=0")
    assert train(tmp_path / "run", *tight, "evaluation.final_episodes=0") == 0
    run = RunDir(tmp_path / "run")
    assert WeightStore(run.weights).manifest(1).metadata["step"] < 30
    assert any(row["version"] == 1 for row in run.read("metrics", "actor0"))


def test_published_weights_load_and_carry_their_step(finished):
    store = WeightStore(finished.weights)
    version = store.latest_version()
    assert version is not None
    manifest = store.manifest(version)
    assert manifest.metadata["step"] == 400 and manifest.metadata["final"]


def test_a_finished_run_is_not_overwritten(finished, capsys):
    before = finished.read("metrics", "evaluation")
    assert train(finished.path) == 2
    assert "run.resume=true" in capsys.readouterr().err
    assert finished.read("metrics", "evaluation") == before


def test_evaluation_of_a_run_repeats_its_last_row(finished, capsys):
    arguments = [f"checkpoint={finished.path}", "episodes=8", "rows=4"]
    assert main(["eval", "--json", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    last = finished.read("metrics", "evaluation")[-1]
    assert result["successes"] == last["successes"]
    assert result["mean_ticks"] == pytest.approx(last["mean_ticks"], abs=0.5)


def test_an_earlier_version_of_a_run_is_evaluated_by_its_number(finished, capsys):
    def said(*arguments):
        code = main(["eval", "--json", "episodes=8", "rows=4", *arguments])
        return code, capsys.readouterr()

    halfway = finished.read("metrics", "evaluation")[0]
    code, printed = said(f"checkpoint={finished.path}", f"version={halfway['version']}")
    assert code == 0 and json.loads(printed.out)["version"] == halfway["version"]
    assert json.loads(printed.out)["episodes"] == 8
    code, printed = said(f"checkpoint={finished.path}", "version=99")
    assert code == 2 and "no weights version 99; there are 1, 2" in " ".join(printed.err.split())
    code, printed = said(f"checkpoint={finished.path / 'policy'}", "task=pointmass", "version=1")
    assert code == 2 and "leave version=1 out" in " ".join(printed.err.split())


def test_resuming_continues_the_steps_and_the_data(tmp_path):
    path = tmp_path / "run"
    assert train(path, "learner.steps=100") == 0
    run = RunDir(path)
    recorded = ReplayReader(run.buffer)
    recorded.refresh()
    before = recorded.num_steps
    assert train(path, "run.resume=true") == 0
    steps = [row["step"] for row in run.read("metrics", "learner")]
    assert steps == sorted(steps) and steps[-1] == 400
    reader = ReplayReader(run.buffer)
    reader.refresh()
    assert reader.num_steps > before
    demonstrations = [e for e in reader.closed_episodes() if e.interventions == len(e.rows)]
    assert 8 <= len(demonstrations) <= 12, "demonstrations are not collected a second time"


def test_resuming_something_else_is_refused(finished, capsys):
    assert train(finished.path, "run.resume=true", "algorithm=bc") == 2
    assert "algorithm differs" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint_says_how_to_go_on(tmp_path, capsys, damage):
    path = tmp_path / "run"
    assert train(path, "learner.steps=100", "learner.checkpoint_every=50") == 0
    checkpoint = path / "checkpoints" / "learner.safetensors"
    data = bytearray(checkpoint.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0x10
    else:
        del data[len(data) // 2 :]
    checkpoint.write_bytes(data)
    assert train(path, "run.resume=true") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "damaged" in said and "learner-previous.safetensors" in said
    checkpoint.unlink()
    assert train(path, "run.resume=true", "learner.steps=100") == 0


@pytest.mark.slow
def test_flow_and_diffusion_over_both_networks_train(tmp_path):
    for policy, network, extra in (
        ("diffusion", "mlp", ["+policy.network.width=64", "+policy.network.depth=1"]),
        ("flow", "unet1d", ["+policy.network.channels=[16,32]"]),
    ):
        base = [item for item in FAST if not item.startswith("+policy.network")]
        path = tmp_path / f"{policy}-{network}"
        overrides = [f"policy={policy}", f"policy/network={network}", *extra]
        overrides += ["learner.steps=50", "algorithm=bc", "evaluation.videos=0"]
        assert main(["train", *base, f"run.dir={path}", *overrides]) == 0
        (row,) = RunDir(path).read("metrics", "evaluation")
        assert row["final"] and row["step"] == 50


def test_what_a_run_recorded_can_be_learned_from_again(finished, tmp_path):
    dataset = f"{{name: recorded, path: {finished.buffer}}}"
    source = ["demonstrations.source=dataset", f"demonstrations.dataset={dataset}"]
    path = tmp_path / "again"
    assert train(path, *source, "demonstrations.episodes=null", "algorithm=bc") == 0
    theirs, ours = ReplayReader(finished.buffer), ReplayReader(path / "buffer")
    theirs.refresh()
    ours.refresh()
    assert ours.num_closed == theirs.num_closed
    for a, b in zip(theirs.closed_episodes(), ours.closed_episodes(), strict=True):
        assert b.stream == f"buffer/{a.stream}"
        assert (a.seed, a.success, a.interventions) == (b.seed, b.success, b.interventions)
        for name in ("observation.state", "action", "reward", "terminated", "policy_version"):
            assert (theirs.take(name, a.rows) == ours.take(name, b.rows)).all()
    assert RunDir(path).read("metrics", "evaluation")[-1]["success_rate"] >= 0.6


def test_the_exported_policy_evaluates_by_itself(finished, capsys):
    arguments = [f"checkpoint={finished.path / 'policy'}", "episodes=8", "rows=4"]
    assert main(["eval", "--json", *arguments]) == 2
    assert "say task=" in " ".join(capsys.readouterr().err.split())
    assert main(["eval", "--json", *arguments, "task=pointmass"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["successes"] == finished.read("metrics", "evaluation")[-1]["successes"]


def test_an_earlier_run_is_a_source_of_every_batch(finished, tmp_path, capsys):
    path = tmp_path / "run"
    sources = [
        "learner.steps=60",
        f"+sampling.sources.earlier.path={finished.path}",
        "+sampling.sources.earlier.ratio=3",
        "+sampling.sources.earlier.draw.name=weighted",
        "+sampling.sources.earlier.draw.failure=0.5",
        "sampling.draw.name=recency",
        "+sampling.draw.last_steps=100",
    ]
    assert train(path, *sources) == 0
    windows = [row["windows"] for row in RunDir(path).read("metrics", "learner")]
    alone = [row["windows"] for row in finished.read("metrics", "learner")]
    assert windows[0] > alone[0] + alone[-1] // 2
    capsys.readouterr()
    assert train(tmp_path / "wrong", "+sampling.sources.a.path=" + str(tmp_path)) == 2
    assert "sampling.sources.a.path" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
    assert train(tmp_path / "name", "sampling.draw.name=recent") == 2
    assert "Did you mean 'recency'?" in capsys.readouterr().err
    assert train(tmp_path / "name", "sampling.draw.name=prioritised") == 2
    assert "no algorithm sets" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "name").exists()
