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
        ("~policy.network.name", "policy.network"),
    ],
)
def test_wrong_input_names_the_key_and_what_would_be_right(override, said):
    with pytest.raises(ConfigError) as caught:
        load_train([override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value).strip()


BY_PERSON = ("actors.devices=arm", "actors.count=1", "algorithm=hg_dagger")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("actors.devices=null",), "actors.devices"),
        (("actors.count=2",), "actors.count=1"),
        (("algorithm=bc",), "hg_dagger"),
        (("actors.align_speed=2",), "actors.align_speed"),
        (("+actors.teleoperator.stp=1",), "actors.teleoperator.step"),
        (("actors.teleoperator=keybord",), "keyboard"),
        (("actors.teleoperator={name: scripted}",), "teleoperator.task"),
    ],
)
def test_a_person_who_cannot_take_over_is_refused(overrides, said):
    with pytest.raises(ConfigError) as caught:
        load_train([*BY_PERSON, "actors.teleoperator=keyboard", *overrides])
    assert said in str(caught.value)


def test_a_person_stands_in_for_a_script_and_may_judge():
    data = ("demonstrations.source=dataset", "demonstrations.dataset={name: pusht_human, path: x}")
    pusht = (*BY_PERSON, "task=pusht", *data)
    with pytest.raises(ConfigError, match="no scripted expert"):
        load_train([*pusht])
    assert load_train([*pusht, "actors.teleoperator=gamepad"]).actors.teleoperator
    two = ("actors.count=2", "actors.teleoperator={name: scripted, task: pointmass}")
    assert load_train([*BY_PERSON, *two]).actors.terminal == "actor0"
    assert load_train([*BY_PERSON, "actors.teleoperator=null"]).actors.terminal == ""
    assert load_train([*BY_PERSON, "actors.teleoperator=keyboard", "reward=success_key"]).reward


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


def test_options_that_are_apart_from_their_class_are_its_own():
    for kind, rows in registry.OPTIONS.items():
        assert rows.keys() <= registry.BUILTIN[kind].keys()
        for name in rows:
            assert registry.resolve(kind, name).Config is registry.config_type(kind, name)


@pytest.mark.parametrize(
    "kind", ["policies", "networks", "encoders", "text_encoders", "value_heads"]
)
def test_options_of_all_that_is_trained_are_apart_from_their_class(kind):
    composed = {"composed", "pooled", "improved", "planned"} if kind == "policies" else set()
    assert registry.OPTIONS[kind].keys() == registry.BUILTIN[kind].keys() - composed


def test_options_are_typed_as_the_component_types_them():
    data = {"name": "recency", "last_steps": 9}
    cls, options = config.component("draws", data, "sampling.draw")
    assert config.options_of("draws", data, "sampling.draw") == options == cls.Config(last_steps=9)
    for find in (config.options_of, config.component):
        with pytest.raises(ConfigError, match="Did you mean 'flow'"):
            find("policies", {"name": "flwo"}, "policy")
        with pytest.raises(ConfigError, match="policy: name is missing"):
            find("policies", None, "policy")


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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["gateway.identity=hub"], "need gateway.listen"),
        (["gateway.listen=10.0.0.1:1"], "without a certificate nothing listens"),
        (["gateway.listen=127.0.0.1:0", "algorithm=bc"], "learn from what robots do"),
        (["gateway.listen=127.0.0.1:0", "actors.count=0"], "actors.count is 0"),
        (["actors.count=0"], "actors.count is 0"),
        (["gateway.listen=127.0.0.1:0", "gateway.mbit_s=0"], "gateway.mbit_s is 0"),
        (
            [
                "gateway.listen=127.0.0.1:0",
                "run.mode=lockstep",
                "learner.minutes=null",
                "learner.steps=10",
            ],
            "lockstep repeats",
        ),
    ],
)
def test_what_a_gateway_cannot_do_is_said_before_the_run(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_train(["task=pointmass", *overrides])
