"""Who takes part in which part of the study, on which tasks, with which settings."""

from typing import Literal

import msgspec

Later = Literal["future", "current", "none"]


class Task(msgspec.Struct, frozen=True):
    """overrides: of `embodied train`. metric: what a result is, an episode's success or the
    greatest value of a signal. file: of the demonstrations; None for scripted ones, as many as
    `demonstrations` to learn from. held: further ones, at the end, that nothing learns from."""

    overrides: tuple[str, ...]
    metric: str
    held: int
    file: str | None = None
    demonstrations: int = 0


class Contender(msgspec.Struct, frozen=True):
    """overrides: of `embodied train`. later: what a window shows after the chunk: the future; the
    newest observation once more; or nothing, so that it stays open. tenth: only each tenth episode
    has labels; of the others the windows have none (free), or they are left out."""

    overrides: tuple[str, ...]
    later: Later = "future"
    tenth: bool = False
    free: bool = False


WIDTH, DEPTH = 64, 4
SIZES = (f"+policy.width={WIDTH}", "+policy.time_dim=64")
SIMILAR = (
    "learner.precision=float32",
    "learner.batch_size=64",
    "learner.learning_rate=1.0e-3",
    "learner.warmup_steps=100",
    "learner.ema_decay=0.995",
)
PICTURES = (
    "policy/images=vit",
    "+policy.images.encoder.patch=14",
    "+policy.images.encoder.width=64",
    "+policy.images.encoder.depth=2",
)
PATCHES = ("+policy.latents.patch=4", "+policy.latents.shrink=3", "policy.form=flow")
"""Of 84 × 84 pixels: 49 tokens, whose velocities are learned much sooner than their noise."""

DIFFUSION = (
    "policy=diffusion",
    "policy/network=dit",
    f"+policy.network.width={WIDTH}",
    f"+policy.network.depth={DEPTH}",
    "+policy.network.time_dim=64",
)
UWM = ("policy=uwm", *SIZES, f"+policy.depth={DEPTH}")
UVA = (
    "policy=uva",
    *SIZES,
    f"+policy.encoder_depth={DEPTH // 2}",
    f"+policy.decoder_depth={DEPTH // 2}",
    f"+policy.head_width={2 * WIDTH}",
)

TASKS = {
    "pusht": Task(("experiment=pusht",), "coverage", 20, "pusht_cchi_v7_lowdim.npz"),
    "pusht-pictures": Task(
        ("experiment=pusht_image", *PICTURES), "coverage", 20, "pusht_cchi_v7_replay.zarr.zip"
    ),
    "peg-insert-side": Task(
        ("task=metaworld/peg-insert-side", "algorithm=bc"), "success", 2, demonstrations=10
    ),
    "box-close": Task(
        ("task=metaworld/box-close", "algorithm=bc"), "success", 2, demonstrations=10
    ),
}

CONTENDERS = {
    "diffusion": Contender(DIFFUSION),
    "uwm": Contender(UWM),
    "uva": Contender(UVA),
    "uwm, left out": Contender((*UWM, "policy.left_out=0.5")),
    "uwm, present shown": Contender(UWM, later="current"),
    "uwm, nothing shown": Contender(UWM, later="none"),
    "uva, policy mode": Contender((*UVA, "policy.modes=[policy]")),
    "diffusion, tenth": Contender(DIFFUSION, tenth=True),
    "uwm, tenth": Contender(UWM, tenth=True),
    "uwm, tenth and free": Contender(UWM, tenth=True, free=True),
    "uva, tenth": Contender(UVA, tenth=True),
    "uva, tenth and free": Contender(UVA, tenth=True, free=True),
}

WORLDS = ("uwm", "uva")
"""Those that predict."""


class Part(msgspec.Struct, frozen=True):
    """contenders: whom it trains, or asks once they are trained. compared: which pairs. tasks."""

    contenders: tuple[str, ...]
    compared: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]


PARTS = {
    "policies": Part(
        ("diffusion", *WORLDS, "uwm, left out"),
        (("uwm", "diffusion"), ("uva", "diffusion"), ("uwm, left out", "uwm")),
        tuple(TASKS),
    ),
    "future": Part(
        ("uwm", "uwm, present shown", "uwm, nothing shown", "uva", "uva, policy mode"),
        (
            ("uwm", "uwm, present shown"),
            ("uwm", "uwm, nothing shown"),
            ("uva", "uva, policy mode"),
        ),
        ("pusht", "peg-insert-side", "box-close"),
    ),
    "labels": Part(
        (
            "diffusion, tenth",
            "uwm, tenth",
            "uwm, tenth and free",
            "uva, tenth",
            "uva, tenth and free",
        ),
        (("uwm, tenth and free", "uwm, tenth"), ("uva, tenth and free", "uva, tenth")),
        ("pusht",),
    ),
    "tracking": Part(WORLDS, (), ("pusht", "pusht-pictures")),
    "ranking": Part(("diffusion", *WORLDS), (), ("pusht",)),
}
