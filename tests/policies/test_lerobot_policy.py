"""LeRobot's policies as ours, against LeRobot itself. Importing it takes long, hence slow."""

import copy
import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from actor_critics import LEARNER
from lerobot_policies import DEVICE, FRONT, STATE, WORDS, export, features
from weights import Pair

from embodied.core.config import options_of
from embodied.core.errors import ConfigError, CorruptDataError, MissingDependencyError
from embodied.core.instructions import TASK, encode_instruction
from embodied.learn.learner import Learner, PolicyFormat
from policies import noise
from policies.build import build_critic, build_policy
from policies.checkpoint import (
    load_policy,
    policy_from_state,
    policy_state,
    save_policy,
)
from policies.critics.configs import ImprovementConfig
from policies.improved import improved
from policies.lerobot import models
from policies.lerobot.chunks import seeded
from policies.specs import policy_spec

pytestmark = pytest.mark.slow

KINDS = ("act", "diffusion", "smolvla", "noisy")
TASKS = ("push the cube left", "push", "the cube right")
STATISTICS = {
    "mean": [0.5] * 3, "std": [2.0] * 3, "min": [-3.0] * 3, "max": [3.0] * 3,
}  # fmt: skip


class Case:
    """One exported policy: LeRobot's own (`theirs`), and ours made of its folder."""

    def __init__(self, path, kind, **options):
        self.kind, self.path = kind, path
        self.theirs = export(path, kind, **options)
        self.ours = self.build()

    def build(self, **options):
        config = {"path": str(self.path), **options}
        return build_policy("lerobot", config, DEVICE, DEVICE.observation, {}, seed=0)

    def obs(self, rows=3, seed=0):
        rng, found = np.random.default_rng(seed), {}
        for key, array in self.ours.spec.observation.items():
            shape = (rows, self.ours.spec.n_obs_steps, *array.shape)
            if key == TASK:
                texts = [encode_instruction(TASKS[i % 3], array.size) for i in range(rows)]
                found[key] = np.stack(texts)[:, None]
            elif array.dtype == "uint8":
                found[key] = rng.integers(0, 256, shape).astype(np.uint8)
            else:
                found[key] = rng.normal(size=shape).astype(np.float32)
        return found

    def batch(self, rows=3):
        rng, horizon = np.random.default_rng(1), self.ours.spec.horizon
        return {
            **self.obs(rows),
            "action": rng.uniform(-1, 1, (rows, horizon, 2)).astype(np.float32),
            "action_is_pad": np.zeros((rows, horizon), bool),
        }

    def theirs_of(self, obs, **labels):
        """The batch that LeRobot's own preprocessor makes of our observations."""
        history = self.kind == "diffusion"
        raw = {}
        for key, value in obs.items():
            if key == TASK:
                raw["task"] = list(TASKS)
                continue
            value = torch.from_numpy(value) if history else torch.from_numpy(value[:, 0])
            picture = key.startswith("observation.images.")
            raw[key] = value.movedim(-1, -3).float() / 255 if picture else value
        return self.theirs.before({**raw, **labels})


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param) / "policy", request.param)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_acts_as_lerobot_does_on_the_same_noise(case):
    obs, seeds, model = case.obs(), [5, 1, 9], case.theirs.model
    _, ours = case.ours.act(None, obs, seed=np.array(seeds))
    batch = case.theirs_of(obs)
    if case.kind == "act":
        chunk = model.predict_action_chunk(batch)
    elif case.kind == "smolvla":
        chunk = model.predict_action_chunk(batch, noise=noise.start_noise(seeds, 6, 4))
    elif case.kind == "diffusion":
        start, rngs = noise.start_noise(seeds, 8, 2), noise.step_generators(seeds)
        whole = model.diffusion.conditional_sample(
            3,
            global_cond=model.diffusion._prepare_global_conditioning(batch),
            generator=rngs,
            noise=start,
        )
        chunk = whole[:, 1:]
    else:
        rows = []
        for index, seed in enumerate(seeds):
            with seeded(seed, torch.device("cpu")):
                own = {k: v[index : index + 1] for k, v in batch.items() if k in obs}
                rows.append(model.predict_action_chunk(own))
        chunk = torch.cat(rows)
    expected = torch.stack([case.theirs.after(step) for step in chunk.unbind(1)], dim=1)
    torch.testing.assert_close(torch.from_numpy(ours), expected.clamp(-2, 2), atol=1e-5, rtol=1e-5)


def test_a_row_depends_on_its_own_seed_alone(case):
    obs, before = case.obs(), torch.get_rng_state()
    assert case.ours.init(3) is None
    _, chunk = case.ours.act(None, obs, seed=np.arange(3))
    spec = case.ours.spec
    assert chunk.shape == (3, spec.horizon, 2) and chunk.dtype == np.float32
    assert np.abs(chunk).max() <= 2
    torch.rand(5)
    np.testing.assert_array_equal(case.ours.act(None, obs, seed=np.arange(3))[1], chunk)
    one = {k: v[1:2] for k, v in obs.items()}
    alone = case.ours.act(None, one, seed=np.array([1]))[1]
    np.testing.assert_allclose(alone[0], chunk[1], atol=1e-5)
    other = case.ours.act(None, obs, seed=np.array([7, 1, 8]))[1]
    np.testing.assert_allclose(other[1], chunk[1], atol=1e-5)
    assert (other[0] != chunk[0]).any() == (case.kind != "act")
    torch.set_rng_state(before)
    case.ours.sample(obs, 2, seed=0)
    case.ours.loss(case.batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_differ_and_repeat(case):
    chunks = case.ours.sample(case.obs(2), 4, seed=0)
    assert chunks.shape == (2, 4, case.ours.spec.horizon, 2) and not chunks.requires_grad
    assert torch.equal(chunks, case.ours.sample(case.obs(2), 4, seed=0))
    assert not torch.equal(chunks, case.ours.sample(case.obs(2), 4, seed=1))
    assert (chunks.std(dim=1) > 1e-4).any(dim=2).all()


def test_committed_actions_head_the_chunk(case):
    obs, prefix = case.obs(), np.full((3, 2, 2), 0.25, np.float32)
    free = case.ours.act(None, obs, seed=np.arange(3))[1]
    chunk = case.ours.act(None, obs, prefix=prefix, seed=np.arange(3))[1]
    np.testing.assert_array_equal(chunk[:, :2], prefix)
    np.testing.assert_array_equal(chunk[:, 2:], free[:, 2:])


def test_the_loss_is_lerobots(case):
    batch, model = case.batch(), copy.deepcopy(case.theirs.model)
    case.ours.seed_training(3)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    loss, metrics = case.ours.loss(batch)
    action = torch.from_numpy(batch["action"])
    action = torch.cat([action[:, :1], action], 1) if case.kind == "diffusion" else action
    pad = torch.zeros(action.shape[:2], dtype=torch.bool)
    obs = {k: v for k, v in batch.items() if not k.startswith("action")}
    theirs = case.theirs_of(obs, action=action, action_is_pad=pad)
    with seeded(seed, torch.device("cpu")):
        expected, _ = model.train()({**theirs, "action_is_pad": pad})
    assert metrics["loss"] == loss.item() == pytest.approx(expected.item(), rel=1e-5)
    case.ours.seed_training(4)
    if case.kind != "act":
        assert case.ours.loss(batch)[0].item() != loss.item()


def test_padded_steps_have_no_influence(case):
    batch = case.batch()
    batch["action_is_pad"][:, -2:] = True
    losses = []
    for value in (0.0, 1.5):
        batch["action"][:, -2:] = value
        case.ours.seed_training(0)
        losses.append(case.ours.loss(batch)[0].item())
    assert losses[0] == losses[1]


def test_it_learns_and_survives_a_checkpoint_and_the_way_to_a_robot(case, tmp_path):
    form = PolicyFormat(("action",), lambda _: case.build(), policy_state, policy_from_state)
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    losses = [learner.update(case.batch(8))["loss"] for _ in range(25)]
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    learner.save(tmp_path / "learner.safetensors", {})
    again, _ = Learner.load(tmp_path / "learner.safetensors", form, LEARNER, seed=1)
    assert again.update(case.batch(8)) == learner.update(case.batch(8))
    pair = Pair(tmp_path, precision="float32")
    config, arrays = learner.weights()
    pair.learner.publish(arrays, config, {"step": 1})
    assert pair.sync() is not None
    pair.assert_mirrored(1)
    robots = policy_from_state(config, pair.acting()[1])
    save_policy(tmp_path / "policy", robots)
    obs, seeds = case.obs(), np.arange(3)
    expected = robots.act(None, obs, seed=seeds)[1]
    assert (expected != case.ours.act(None, obs, seed=seeds)[1]).any()
    for twin in (load_policy(tmp_path / "policy"), copy.deepcopy(robots)):
        assert twin.spec == case.ours.spec
        np.testing.assert_array_equal(twin.act(None, obs, seed=seeds)[1], expected)


def test_what_was_trained_needs_no_export_any_more(tmp_path):
    case = Case(tmp_path / "gone", "act")
    save_policy(tmp_path / "kept", case.ours)
    for path in case.path.iterdir():
        path.unlink()
    load_policy(tmp_path / "kept")


def test_a_critic_improves_it(case):
    spec = type(case.ours.spec)(
        {STATE: DEVICE.observation[STATE]}, DEVICE.action, 1, case.ours.spec.horizon, 2
    )
    statistics = {STATE: type("Stats", (), STATISTICS)}
    options = {"head": {"name": "scalar"}, "horizon": 2, "members": 2, "width": 16}
    critic = build_critic(options, spec, statistics, seed=0)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator()))
    options = ImprovementConfig(proposals=4, kept=2, steps=2, step_size=0.1)
    policy = improved(case.ours, critic, options)
    batch = {k: torch.from_numpy(v) for k, v in case.batch().items()}
    policy.train()
    drawn = case.ours.sample(case.obs(), 4, seed=0)
    observation = {key: batch[key] for key in policy.spec.observation}
    best_BHD = policy.optimised(observation, drawn, seed=0, temperature=None)
    q = policy.critic.q({STATE: batch[STATE][:, -1:]}, torch.cat([drawn, best_BHD[:, None]], 1))
    assert (q[:, -1] > q[:, :-1].max(dim=1).values).all()
    loss, _ = policy.loss({**batch, "action": best_BHD})
    loss.backward()
    assert all(p.grad is None for p in critic.parameters())
    assert any(p.grad is not None for p in case.ours.parameters())
    case.ours.zero_grad(set_to_none=True)
    assert policy.act(None, case.obs(), seed=np.arange(3))[1].shape == best_BHD.shape


def test_pictures_and_their_statistics(tmp_path):
    for kind, keys in (("act", (STATE, FRONT)), ("diffusion", (STATE, FRONT))):
        case = Case(tmp_path / kind, kind, input_features=features(*keys)["input_features"])
        ours = case.ours.act(None, case.obs(), seed=np.arange(3))[1]
        dark = {**case.obs(), FRONT: np.zeros_like(case.obs()[FRONT])}
        assert (case.ours.act(None, dark, seed=np.arange(3))[1] != ours).any()
        batch = case.theirs_of(case.obs())
        torch.testing.assert_close(
            case.ours._batch(case.ours._read(case.obs()))[FRONT], batch[FRONT], rtol=0, atol=0
        )
        twin = policy_from_state(*policy_state(case.ours))
        np.testing.assert_array_equal(twin.act(None, case.obs(), seed=np.arange(3))[1], ours)


def test_statistics_of_the_data_take_the_exported_ones_place(tmp_path):
    case = Case(tmp_path / "act", "act")
    names = {STATE: 3, "action": 2}  # ACT leaves the environment's state as it is
    stats = {
        key: type("Stats", (), {n: v[:size] for n, v in STATISTICS.items()})
        for key, size in names.items()
    }
    config = {"path": str(case.path), "statistics": "data"}
    policy = build_policy("lerobot", config, DEVICE, DEVICE.observation, stats, seed=0)
    assert set(policy.normalized_keys) == set(names) and case.ours.normalized_keys == ()
    assert policy.normalizers["observation/state"].shift.tolist() == [0.5] * 3
    assert case.ours.normalizers["observation/state"].shift.tolist() == pytest.approx([0, 0.1, 0.2])
    with pytest.raises(ConfigError, match="statistics key"):
        build_policy("lerobot", config, DEVICE, DEVICE.observation, {}, seed=0)


def test_the_instruction_is_what_the_tokenizer_makes_of_it(tmp_path):
    case = Case(tmp_path / "vla", "smolvla")
    ids = case.ours._batch(case.ours._read(case.obs()))["observation.language.tokens"]
    push, newline = (4 + WORDS.index(word) for word in ("push", "\n"))
    assert ids.tolist()[1] == [push, newline, 0, 0, 0]
    torch.testing.assert_close(ids, case.theirs_of(case.obs())["observation.language.tokens"])
    moved = {**case.obs(), TASK: case.obs()[TASK][[1, 1, 2]]}
    seeds, obs = np.arange(3), case.obs()
    same, other = (case.ours.act(None, o, seed=seeds)[1] for o in (obs, moved))
    assert (same[0] != other[0]).any()
    np.testing.assert_allclose(same[1:], other[1:], atol=1e-5)


def test_weights_that_are_not_the_models_stop_it(tmp_path):
    case = Case(tmp_path / "act", "act")
    weights = safetensors.torch.load_file(case.path / "model.safetensors")
    name = sorted(weights)[0]
    less = {k: v for k, v in weights.items() if k != name}
    nan = {**weights, name: torch.full_like(weights[name], torch.nan)}
    more = {**weights, "more": torch.ones(1)}
    for changed, match in ((less, name), (more, "more"), (nan, "finite")):
        safetensors.torch.save_file(changed, case.path / "model.safetensors")
        with pytest.raises(CorruptDataError, match=match):
            case.build()
    (case.path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptDataError, match="other weights"):
        case.build()


def test_what_cannot_be_made_is_refused_with_the_reason(tmp_path, monkeypatch):
    case = Case(tmp_path / "act", "act")
    original = (case.path / "config.json").read_text()
    for edit, match in (
        ({"type": "actt"}, r"unknown LeRobot policy 'actt'.*'act'"),
        ({"dim_modell": 3}, "dim_modell"),
        ({"vision_backbone": "vgg"}, "vgg"),
        ({"type": "pi0"}, r"'pi0' needs a patched transformers.*models\.siglip\.check"),
        ({"type": "pi05"}, r"'pi05' needs a patched transformers.*models\.siglip\.check"),
        ({"type": "pi0_fast"}, r"'pi0_fast' needs a patched transformers"),
    ):
        (case.path / "config.json").write_text(json.dumps({**json.loads(original), **edit}))
        with pytest.raises(ConfigError, match=match):
            case.build()
    (case.path / "config.json").write_text(original)
    for name in [n for n in sys.modules if n.partition(".")[0] == "lerobot"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"'lerobot.*embodied-stack\[lerobot\]"):
        case.build()


def test_a_language_model_that_changed_is_noticed(tmp_path):
    case = Case(tmp_path / "vla", "smolvla")
    save_policy(tmp_path / "kept", case.ours)
    folder = tmp_path / "language model"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scale_factor": 4}))
    with pytest.raises(CorruptDataError, match="is not what the policy was made with"):
        load_policy(tmp_path / "kept")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    with pytest.raises(ConfigError, match="describes a 'other'; smolvlm"):
        case.build()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="nothing is downloaded"):
        case.build()


def test_nothing_is_fetched(tmp_path):
    assert models.WITHOUT["pretrained_backbone_weights"] is None
    case = Case(tmp_path / "act", "act", input_features=features(STATE, FRONT)["input_features"])
    config = json.loads((case.path / "config.json").read_text())
    config["pretrained_backbone_weights"] = "ResNet18_Weights.IMAGENET1K_V1"
    (case.path / "config.json").write_text(json.dumps(config))
    import torchvision

    def fetch(*args, **kwargs):
        raise AssertionError("a download")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision._internally_replaced_utils, "load_state_dict_from_url", fetch)
        patch.setattr(torch.hub, "load_state_dict_from_url", fetch)
        case.build()


def test_the_spec_is_known_without_the_model(case):
    config = options_of("policies", {"name": "lerobot", "path": str(case.path)}, "policy")
    assert policy_spec(DEVICE, DEVICE.observation, config) == case.ours.spec
