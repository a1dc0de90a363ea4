"""Pairs, their recipes and the search's budget: fixed before the first composed rollout.

Both parents of a pair are imperfect by their short training and because each sees one half of the
demonstrations (every other episode); they differ in network, objective, history or observations.
Nothing here was chosen by the results of compositions. A change begins a new study: the command
refuses to mix results of two tables.
"""

import msgspec

STATE, ENVIRONMENT = "observation.state", "observation.environment_state"
BOTH = (STATE, ENVIRONMENT)

MLP = ("policy/network=mlp",)
UNET = ("policy/network=unet1d", "learner.batch_size=64")
NO_HISTORY = ("policy.n_obs_steps=1",)
FLOW = ("policy=flow",)
DIFFUSION = ("policy=diffusion",)
SAMPLE = ("+policy.prediction_type=sample",)
V = ("+policy.prediction_type=v_prediction",)


class Parent(msgspec.Struct, frozen=True):
    """overrides: of `embodied train`. half: 0 takes the even episodes, 1 the odd ones. steps: of
    gradient descent. keys: what it observes."""

    overrides: tuple[str, ...]
    half: int
    steps: int
    keys: tuple[str, ...] = BOTH


class Pair(msgspec.Struct, frozen=True):
    """a, b: the parents, in the order of the weights (w, 1 − w)."""

    task: str
    a: Parent
    b: Parent


class Recipe(msgspec.Struct, frozen=True):
    """demonstrations: scripted ones that succeed, in all; None for the people's of PushT. metric:
    what a search maximises and a result is, of an episode: its success or a signal's maximum."""

    demonstrations: int | None
    metric: str


class Budget(msgspec.Struct, frozen=True):
    """Of every pair. search: successive halving over w = 0, 0.1, …, 1: 11 weights play 16
    episodes, the best 4 play 40, the best 2 play 100, 392 episodes in all. episodes, first_seed:
    fresh start states, for every contender. double: how much longer the control is trained."""

    search: dict[str, str | int | float]
    episodes: int
    first_seed: int = 0
    double: int = 2


TASKS = {
    "pusht": Recipe(None, "reward"),
    "metaworld/peg-insert-side": Recipe(20, "success"),
    "metaworld/box-close": Recipe(20, "success"),
    "metaworld/pick-place-wall": Recipe(20, "success"),
    "robosuite/PickPlaceCan": Recipe(20, "success"),
}

PAIRS = {
    "pusht-network": Pair(
        "pusht",
        Parent(FLOW + MLP, 0, 6000),
        Parent(DIFFUSION + UNET + NO_HISTORY, 1, 4000),
    ),
    "pusht-objective": Pair(
        "pusht",
        Parent(FLOW + UNET, 1, 4000),
        Parent(DIFFUSION + MLP + SAMPLE, 0, 6000),
    ),
    "peg-network": Pair(
        "metaworld/peg-insert-side",
        Parent(FLOW + MLP, 0, 2500),
        Parent(DIFFUSION + UNET + NO_HISTORY, 1, 2500),
    ),
    "peg-objective": Pair(
        "metaworld/peg-insert-side",
        Parent(DIFFUSION + MLP + SAMPLE, 0, 2500),
        Parent(FLOW + MLP, 1, 2500, keys=(ENVIRONMENT,)),
    ),
    "box-observation": Pair(
        "metaworld/box-close",
        Parent(FLOW + MLP, 0, 2500),
        Parent(DIFFUSION + MLP + V, 1, 2500, keys=(ENVIRONMENT,)),
    ),
    "wall-network": Pair(
        "metaworld/pick-place-wall",
        Parent(FLOW + MLP, 0, 2500, keys=(ENVIRONMENT,)),
        Parent(FLOW + UNET, 1, 2500),
    ),
    "can-network": Pair(
        "robosuite/PickPlaceCan",
        Parent(DIFFUSION + MLP, 0, 2500),
        Parent(FLOW + UNET + NO_HISTORY, 1, 2500),
    ),
}

BUDGET = Budget({"name": "bandit", "steps": 10, "first_episodes": 16, "keep": 0.4}, 100)

QUICK_PAIRS = ("pusht-network", "peg-network")
QUICK_BUDGET = Budget({"name": "bandit", "steps": 2, "first_episodes": 2, "keep": 0.5}, 2, 1000)
QUICK_STEPS, QUICK_DEMONSTRATIONS, QUICK_HORIZON = 20, 4, 24


class Table(msgspec.Struct, frozen=True):
    """All that is fixed in advance."""

    tasks: dict[str, Recipe]
    pairs: dict[str, Pair]
    budget: Budget
    horizon: int | None = None


def table(*, quick: bool) -> Table:
    """The study's; or a small one that only shows that everything works."""
    if not quick:
        return Table(TASKS, PAIRS, BUDGET)
    shorter = msgspec.structs.replace
    pairs = {
        name: Pair(
            PAIRS[name].task,
            shorter(PAIRS[name].a, steps=QUICK_STEPS),
            shorter(PAIRS[name].b, steps=QUICK_STEPS),
        )
        for name in QUICK_PAIRS
    }
    tasks = {
        name: recipe
        if recipe.demonstrations is None
        else shorter(recipe, demonstrations=QUICK_DEMONSTRATIONS)
        for name, recipe in TASKS.items()
    }
    return Table(tasks, pairs, QUICK_BUDGET, QUICK_HORIZON)
