"""What the study of world models learns from, who is chosen, and what is followed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.cloning import Demonstrations
from benchmarks.study_worlds.cells import Cell, Study
from benchmarks.study_worlds.pusht import ENVIRONMENT, GOAL, STATE, Rows
from benchmarks.study_worlds.ranking import FIRST, SIMULATOR, chosen
from benchmarks.study_worlds.tracking import by_mode, put
from embodied.core.episodes import Step
from embodied.core.seeds import derive_seed
from policies.build import build_policy
from policies.world.planning import Planner
from sim.family import SimConfig
from sim.pusht import PushTDriver
from sim.pusht_demos import PushTDemonstrations

FIXTURE = Path(__file__).parents[1] / "data" / "pusht_three_episodes.npz"
KEYS = (STATE, ENVIRONMENT)
SIZES = {"width": 16, "heads": 2, "time_dim": 16}
CHUNK = {"horizon": 8, "n_action_steps": 4, "n_obs_steps": 2}
OPTIONS = {
    "flow": {"network": {"name": "mlp", "width": 16, "depth": 1, "time_dim": 16}},
    "uwm": {**SIZES, "form": "flow", "depth": 1, "registers": 1},
    "uva": {
        **SIZES,
        "form": "flow",
        "encoder_depth": 1,
        "decoder_depth": 1,
        "head_width": 16,
        "head_depth": 1,
        "frames": 4,
    },
}


def numbered(count):
    """Episodes of 3 to 5 steps; an action says of which it is."""
    return [
        [
            Step(
                stream="s",
                episode=episode,
                index=i,
                observation={"observation.state": np.array([i], np.float32)},
                action=np.array([episode], np.float32),
                final=i == 3 + episode % 3,
            )
            for i in range(4 + episode % 3)
        ]
        for episode in range(count)
    ]


def learned(contender, count=27, held=4):
    """What it learns from, of so many episodes."""
    return Cell(Study("runs/none", 1.0, 2, held=held), "pusht", contender, 1)._shown(
        numbered(count)
    )


def episodes_of(actions):
    return np.unique(actions).astype(int).tolist()


@pytest.mark.parametrize("contender", ["diffusion", "uwm", "uva", "uwm, nothing shown"])
def test_nothing_learns_from_the_last_episodes(contender):
    found = learned(contender)
    assert episodes_of(found.action) == list(range(23))
    assert found.labelled.all() and len(found.action) == sum(3 + i % 3 for i in range(23))
    assert episodes_of(learned(contender, held=100).action) == list(range(7))  # the task's 20


@pytest.mark.parametrize("world", ["uwm", "uva"])
def test_a_tenth_of_the_labels_are_those_of_a_tenth_of_the_episodes(world):
    tenth, free = learned(f"{world}, tenth"), learned(f"{world}, tenth and free")
    assert episodes_of(tenth.action) == [0, 10, 20] and tenth.labelled.all()
    assert episodes_of(free.action) == list(range(23))
    assert free.action[free.labelled].tolist() == tenth.action.tolist()
    assert learned("diffusion, tenth").action.tolist() == tenth.action.tolist()


@pytest.fixture(scope="module")
def demonstrations():
    return list(PushTDemonstrations(PushTDemonstrations.Config(path=str(FIXTURE))).episodes())


@pytest.fixture(scope="module")
def make(demonstrations):
    """Policies whose weights, the last layers' too, are random."""

    def build(name, **options):
        statistics = Demonstrations.of(demonstrations).statistics()
        config = {**CHUNK, **OPTIONS[name], **options}
        spec = PushTDriver(SimConfig()).spec
        policy = build_policy(name, config, spec, KEYS, statistics, seed=0)
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
        return policy

    return build


@pytest.fixture
def rows():
    pytest.importorskip("gym_pusht")
    made = Rows(3, SimConfig())
    yield made
    made.close()


def observed(steps):
    """As if nothing had happened before."""
    return {key: np.stack([[step.observation[key]] * 2 for step in steps]) for key in KEYS}


def place(rows, demonstrations, tick):
    """All drivers where the demonstrations were; what is observed there."""
    steps = [episode[tick] for episode in demonstrations]
    for driver, step in zip(rows.drivers, steps, strict=True):
        put(driver, step)
    return observed(steps)


def taken(pool_BnHD, chunks_BHD):
    """Which proposal each chunk is."""
    same_Bn = (pool_BnHD.numpy() == chunks_BHD[:, None]).all(axis=(2, 3))
    assert (same_Bn.sum(axis=1) == 1).all()
    return same_Bn.argmax(axis=1).tolist()


def end(driver, chunk_HD):
    made = driver.twin()
    for action_D in chunk_HD:
        made.drive(action_D)
        made.step_time()
    return made.sense()[ENVIRONMENT]


def test_the_goal_is_where_the_block_covers_its_mark(rows):
    driver = rows.drivers[0]
    x, y, sine, cosine = GOAL
    driver.set_state(np.array([20.0, 20.0]), np.array([x, y]), np.arctan2(sine, cosine))
    np.testing.assert_allclose(driver.sense()[ENVIRONMENT], GOAL, atol=0.1)
    assert driver.signals()["coverage"] > 0.99


def test_whoever_chooses_takes_the_proposal_that_ends_nearest_to_the_goal(
    make, rows, demonstrations, monkeypatch
):
    policy, n, seeds, tick = make("flow"), 6, range(3, 6), 40
    goal = {"name": "goal", "targets": {ENVIRONMENT: GOAL}}
    planners = {name: Planner(policy, make(name), goal, n) for name in ("uwm", "uva")}
    obs, pools = place(rows, demonstrations, tick), []
    sample = policy.sample

    def kept(*given, **options):
        pools.append(sample(*given, **options))
        return pools[-1]

    monkeypatch.setattr(policy, "sample", kept)
    found = {
        who: chosen(who, policy, planners, seeds, n)(tick, obs, rows.drivers)
        for who in (FIRST, SIMULATOR, *planners)
    }
    pool_BnHD = pools[0]
    assert len(pools) == 4 and all(torch.equal(one, pool_BnHD) for one in pools)
    assert taken(pool_BnHD, found[FIRST]) == [0, 0, 0]
    ends = [
        [end(driver, chunk) for chunk in own]
        for driver, own in zip(rows.drivers, pool_BnHD.numpy(), strict=True)
    ]
    distance_Bn = np.linalg.norm(np.array(ends) - np.array(GOAL), axis=2)
    assert (np.ptp(distance_Bn, axis=1) > 20).all()
    assert taken(pool_BnHD, found[SIMULATOR]) == distance_Bn.argmin(axis=1).tolist()
    for name, planner in planners.items():
        score_Bn = planner.scores(
            obs, pool_BnHD, [derive_seed(seed, "imagined", tick) for seed in seeds]
        )
        assert taken(pool_BnHD, found[name]) == score_Bn.argmax(dim=1).tolist()


def test_a_demonstration_begins_where_it_was_and_its_actions_do_what_they_did(
    make, rows, demonstrations
):
    place(rows, demonstrations, 60)
    for driver, episode in zip(rows.drivers, demonstrations, strict=True):
        for key, value in driver.sense().items():
            np.testing.assert_allclose(value, episode[60].observation[key], atol=1.0)
    recorded = []
    for driver, episode in zip(rows.drivers, demonstrations, strict=True):
        coverage = []
        for step in episode:
            put(driver, step)
            coverage.append(driver.signals()["coverage"])
        recorded.append(max(coverage))
    place(rows, demonstrations, 0)
    ticks = [len(episode) - 1 for episode in demonstrations]
    model = make("uva")
    replayed = rows.play(by_mode("replay", model, demonstrations), model.spec, ticks)
    assert replayed == pytest.approx(recorded, abs=1e-3) and min(recorded) > 0.8


def changed(episode, at, what):
    """The same but for one tick."""
    other = list(episode)
    if what == "action":
        other[at] = dataclasses.replace(episode[at], action=episode[at].action + 60)
    else:
        observation = {key: x + 60 for key, x in episode[at].observation.items()}
        other[at] = dataclasses.replace(episode[at], observation=observation)
    return other


def read_at(mode, model, tick, episodes, what):
    """Which ticks of an episode have a say in what is done in its row at a tick."""
    obs = observed([episode[tick] for episode in episodes])
    plain = by_mode(mode, model, episodes)(tick, obs, ())
    found = [set() for _ in episodes]
    for row, episode in enumerate(episodes):
        for at in range(len(episode)):
            others = [*episodes]
            others[row] = changed(episode, at, what)
            chunks = by_mode(mode, model, others)(tick, obs, ())
            differs_B = (chunks != plain).any(axis=(1, 2))
            assert not np.delete(differs_B, row).any()
            if differs_B[row]:
                found[row].add(at)
    return found


@pytest.mark.parametrize(
    ("name", "tick", "later"),
    [
        ("uwm", 8, {16}),
        ("uwm", 14, {19}),
        ("uva", 8, {10, 12, 14, 16}),
        ("uva", 14, {16, 18, 19}),
    ],
)
def test_what_was_seen_after_the_chunk_is_followed_and_nothing_else(
    make, demonstrations, name, tick, later
):
    model = make(name, num_steps=2)
    episodes = [episode[:20] for episode in demonstrations[:2]]
    assert read_at("inverse", model, tick, episodes, "observation") == [later, later]
    assert read_at("policy", model, tick, episodes, "observation") == [set(), set()]
    actions = set(range(tick, min(tick + 8, 19)))
    assert read_at("replay", model, tick, episodes, "action") == [actions, actions]
