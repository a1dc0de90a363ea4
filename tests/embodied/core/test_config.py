import msgspec
import pytest

from embodied.core import config, registry
from embodied.core.errors import ConfigError, MissingDependencyError
from embodied.run.config import TrainConfig, load_train


def test_the_defaults_compose_and_type():
    typed = load_train([])
    assert typed.policy["name"] == "flow" and typed.algorithm["name"] == "dagger"
    assert config.convert(msgspec.to_builtins(typed), TrainConfig) == typed


@pytest.mark.parametrize("experiment", ["demo", "pusht"])
def test_every_experiment_composes(experiment, tmp_path):
    path = tmp_path / "data.npz"
    overrides = [f"experiment={experiment}"]
    if experiment == "pusht":
        overrides.append(f"demonstrations.dataset.path={path}")
    assert load_train(overrides).task


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.batchsize=3", "learner.batch_size"),
        ("lerner.steps=3", "learner"),
        ("policy=flwo", "flow"),
        ("policy/network=unet", "unet1d"),
        ("algorithm=daggr", "dagger"),
        ("experiment=dmeo", "demo"),
        ("task=metaworld/asembly", "metaworld/assembly"),
        ("task=metawrld/assembly", "metaworld/assembly"),
        ("task=robosuite/Lif", "robosuite/Lift"),
        ("+policy.num_stps=3", "policy.num_steps"),
        ("+policy.network.widht=3", "width"),
        ("+algorithm.rol_in=1.0", "roll_in"),
        ("+sim.camera=3", "sim.cameras"),
        ("learner.steps=many", "learner.steps"),
        ("learner.steps=0", "at least 1"),
        ("sim.image_size=4", "sim.image_size"),
        ("run.mode=lockstp", "run.mode"),
        ("run.resume=true", "run.dir"),
        ("task=pusht", "scripted expert"),
        ("demonstrations.source=none", "nothing would ever be learned"),
        ("learner.minutes=0", "positive"),
        ("evaluation.episodes=-1", "at least 0"),
        ("actors.speed=-0.5", "actors.speed"),
        ("policy=null", "policy"),
        ("~policy.network", "policy.network"),
    ],
)
def test_wrong_input_names_the_key_and_what_would_be_right(override, said):
    with pytest.raises(ConfigError) as caught:
        load_train([override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_lockstep_refuses_a_budget_in_minutes():
    with pytest.raises(ConfigError, match=r"learner\.minutes"):
        load_train(["run.mode=lockstep", "learner.minutes=1"])


def test_waiting_for_data_that_nobody_collects_is_refused():
    with pytest.raises(ConfigError, match="bc collects none"):
        load_train(["algorithm=bc", "learner.samples_per_insert=1.0"])


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'diffusion'"):
        registry.resolve("policies", "difusion")
    with pytest.raises(ConfigError, match="registry kind"):
        registry.names("polices")


def test_every_registered_name_resolves():
    for kind, rows in registry.BUILTIN.items():
        for name in rows:
            assert callable(registry.resolve(kind, name)), (kind, name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(registry.BUILTIN["policies"], "ghost", "no_such_package.policy:Ghost")
    registry._rows.cache_clear()
    registry.names.cache_clear()
    try:
        with pytest.raises(MissingDependencyError, match="no_such_package"):
            registry.resolve("policies", "ghost")
    finally:
        monkeypatch.undo()
        registry._rows.cache_clear()
        registry.names.cache_clear()
