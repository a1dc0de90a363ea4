"""Names to classes: the one place where 'module:Class' strings are resolved."""

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterable
from functools import cache
from typing import Any

from embodied.core.errors import ConfigError, MissingDependencyError

BUILTIN: dict[str, dict[str, str]] = {
    "tasks": {
        "pusht": "sim.pusht:PushTFamily",
        "metaworld": "sim.metaworld:MetaWorldFamily",
        "robosuite": "sim.robosuite:RobosuiteFamily",
        "pointmass": "sim.pointmass:PointMassFamily",
        "so101": "sim.so101.family:SO101Family",
    },
    "policies": {
        "flow": "policies.flow:FlowPolicy",
        "meanflow": "policies.meanflow:MeanFlowPolicy",
        "diffusion": "policies.diffusion:DiffusionPolicy",
        "act": "policies.act:ACT",
        "gaussian": "policies.gaussian:GaussianPolicy",
        "autoregressive": "policies.tokens.policy:AutoregressivePolicy",
        "vla": "policies.vla.policy:VLA",
        "uwm": "policies.world.uwm:UWM",
        "uva": "policies.world.uva:UVA",
        "vae": "policies.autoencoder.policy:VAE",
        "lerobot": "policies.lerobot.policy:LeRobotPolicy",
        "lora": "policies.lora.policy:LoRAPolicy",
        "composed": "policies.compose.policy:ComposedPolicy",
        "pooled": "policies.compose.pooled:PooledPolicy",
        "improved": "policies.improved:ImprovedPolicy",
        "planned": "policies.world.planning:PlannedPolicy",
    },
    "operators": {
        "mix": "policies.compose.operators:Mix",
        "product": "policies.compose.operators:Product",
        "cfg": "policies.compose.operators:ClassifierFree",
        "or": "policies.compose.superposition:Or",
        "and": "policies.compose.superposition:And",
        "critic": "policies.compose.critics:CriticWeights",
    },
    "critics": {
        "medoid": "policies.compose.critics:Medoid",
    },
    "value_heads": {
        "hl_gauss": "policies.critics.heads:HLGauss",
        "scalar": "policies.critics.heads:Scalar",
    },
    "networks": {
        "mlp": "policies.networks.mlp:ResidualMLP",
        "unet1d": "policies.networks.unet1d:ConditionalUnet1D",
        "dit": "policies.networks.dit:DiT",
    },
    "encoders": {
        "resnet18": "policies.encoders.resnet:ResNet18",
        "vit": "policies.encoders.vit:ViT",
    },
    "text_encoders": {
        "ngrams": "policies.encoders.ngrams:HashedNgrams",
        "words": "policies.encoders.words:HashedWords",
    },
    "tokenizers": {
        "bins": "policies.tokens.tokenizers:Bins",
        "dct": "policies.tokens.tokenizers:DCT",
    },
    "latents": {
        "patches": "policies.world.latents:Patches",
        "vae": "policies.autoencoder.latents:VAELatents",
        "diffusers": "policies.autoencoder.latents:DiffusersLatents",
    },
    "scorers": {
        "goal": "policies.world.scorers:GoalScorer",
        "critic": "policies.world.scorers:CriticScorer",
    },
    "solvers": {
        "ddim": "policies.solvers.diffusion:DDIM",
        "ddpm": "policies.solvers.diffusion:DDPM",
        "dpmsolver++": "policies.solvers.diffusion:DPMSolver",
        "euler": "policies.solvers.flow:Euler",
        "heun": "policies.solvers.flow:Heun",
    },
    "searches": {
        "grid": "embodied.run.simplex_search:Grid",
        "bandit": "embodied.run.simplex_search:Bandit",
        "bayes": "embodied.run.simplex_search:Bayes",
        "analytic": "embodied.run.simplex_search:Analytic",
    },
    "algorithms": {
        "bc": "embodied.learn.bc:BC",
        "dagger": "embodied.learn.dagger:DAgger",
        "filtered_bc": "embodied.learn.filtered_bc:FilteredBC",
        "hg_dagger": "embodied.learn.hg_dagger:HGDAgger",
        "idql": "embodied.learn.idql:IDQL",
        "parl": "embodied.learn.parl:PARL",
        "reconstruction": "embodied.learn.reconstruction:Reconstruction",
        "rlpd": "embodied.learn.rlpd:RLPD",
    },
    "draws": {
        "uniform": "embodied.buffer.sample.draws:Uniform",
        "recency": "embodied.buffer.sample.draws:Recency",
        "weighted": "embodied.buffer.sample.draws:Weighted",
        "stratified": "embodied.buffer.sample.draws:Stratified",
        "prioritised": "embodied.buffer.sample.priorities:Prioritised",
    },
    "drivers": {
        "so101": "hal.drivers.so101:SO101",
        "lerobot": "hal.drivers.lerobot:LeRobot",
        "gymnasium": "hal.drivers.gymnasium:Gymnasium",
        "simulated": "sim.driver:Simulated",
    },
    "specimens": {
        "so101": "sim.specimens:so101",
        "lerobot": "sim.specimens:lerobot",
        "gymnasium": "sim.specimens:gymnasium",
        "simulated": "sim.specimens:simulated",
    },
    "cameras": {
        "opencv": "hal.drivers.opencv:OpenCVCamera",
    },
    "teleoperators": {
        "keyboard": "hal.teleop.keyboard:Keyboard",
        "gamepad": "hal.teleop.gamepad:Gamepad",
        "so101_leader": "hal.drivers.so101:SO101Leader",
        "lerobot": "hal.drivers.lerobot:LeRobotTeleoperator",
        "scripted": "sim.driver:ScriptedTeleoperator",
        "nobody": "hal.teleop.nobody:Nobody",
    },
    "resets": {
        "motion": "hal.tasks:MotionReset",
        "person": "hal.tasks:PersonReset",
    },
    "rewards": {
        "rule": "hal.rewards:Rule",
        "reach": "hal.rewards:Reach",
        "success_key": "hal.rewards:SuccessKey",
        "classifier": "embodied.run.success.judging:ClassifierReward",
    },
    "enumerators": {
        "simulators": "sim.family:enumerate_devices",
        "gpus": "hal.discovery:enumerate_gpus",
        "serial": "hal.drivers.discovery:serial_robots",
        "cameras": "hal.drivers.discovery:cameras",
        "gamepads": "hal.teleop.gamepad:enumerate_gamepads",
    },
    "datasets": {
        "pusht_human": "sim.pusht_demos:PushTDemonstrations",
        "recorded": "embodied.buffer.interchange.recorded:RecordedEpisodes",
        "lerobot": "embodied.buffer.interchange.lerobot_import:LeRobotEpisodes",
        "robomimic": "embodied.buffer.interchange.robomimic:RobomimicEpisodes",
        "videos": "embodied.buffer.interchange.video_folder:VideoFolder",
    },
}
"""Kind → name → 'module:Class'. Third parties add rows by entry points in `embodied.<kind>`."""

OPTIONS: dict[str, dict[str, str]] = {
    "policies": {
        "flow": "policies.configs:FlowConfig",
        "meanflow": "policies.configs:MeanFlowConfig",
        "diffusion": "policies.configs:DiffusionConfig",
        "act": "policies.configs:ACTConfig",
        "gaussian": "policies.configs:GaussianConfig",
        "autoregressive": "policies.tokens.configs:AutoregressiveConfig",
        "vla": "policies.vla.configs:VLAConfig",
        "uwm": "policies.world.configs:UWMConfig",
        "uva": "policies.world.configs:UVAConfig",
        "vae": "policies.autoencoder.configs:VAEConfig",
        "lerobot": "policies.lerobot.config:LeRobotConfig",
        "lora": "policies.lora.config:LoRAConfig",
    },
    "networks": {
        "mlp": "policies.configs:MLPConfig",
        "unet1d": "policies.configs:Unet1DConfig",
        "dit": "policies.configs:DiTConfig",
    },
    "encoders": {
        "resnet18": "policies.configs:ResNet18Config",
        "vit": "policies.configs:ViTConfig",
    },
    "text_encoders": {
        "ngrams": "policies.configs:NgramsConfig",
        "words": "policies.configs:WordsConfig",
    },
    "tokenizers": {
        "bins": "policies.tokens.configs:BinsConfig",
        "dct": "policies.tokens.configs:DCTConfig",
    },
    "latents": {
        "patches": "policies.world.configs:PatchesConfig",
        "vae": "policies.autoencoder.configs:VAELatentsConfig",
        "diffusers": "policies.autoencoder.configs:DiffusersLatentsConfig",
    },
    "scorers": {
        "goal": "policies.world.configs:GoalScorerConfig",
        "critic": "policies.world.configs:CriticScorerConfig",
    },
    "value_heads": {
        "hl_gauss": "policies.critics.configs:HLGaussConfig",
        "scalar": "policies.critics.configs:ScalarConfig",
    },
}
"""Kind → name → 'module:Class' of the `Config` of built-in classes whose own module loads torch, so
that a configuration is checked without it."""


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not known: it offers the nearest one and lists the others."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=_LISTED, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    listed = names if len(names) <= _LISTED else sorted(close or names[:_LISTED])
    rest = f" and {len(names) - len(listed)} more" if len(listed) < len(names) else ""
    return ConfigError(f"unknown {what} '{name}'.{hint} Known: {', '.join(listed)}{rest}.")


_LISTED = 12
_OURS = frozenset({"embodied", "hal", "policies", "sim", "deploy"})


@cache
def names(kind: str) -> tuple[str, ...]:
    """All names registered under a kind, built in or by entry points."""
    if kind not in BUILTIN:
        raise unknown("registry kind", kind, BUILTIN)
    return tuple(sorted(_rows(kind)))


@cache
def _rows(kind: str) -> dict[str, str]:
    rows = dict(BUILTIN[kind])
    for point in importlib.metadata.entry_points(group=f"embodied.{kind}"):
        if rows.setdefault(point.name, point.value) != point.value:
            raise ConfigError(
                f"two {kind} are named '{point.name}': {rows[point.name]} and {point.value}; "
                "rename one of them"
            )
    return rows


def _singular(kind: str) -> str:
    if kind.endswith("ies"):
        return kind.removesuffix("ies") + "y"
    return kind.removesuffix("es") if kind.endswith("ches") else kind.removesuffix("s")


@cache
def resolve(kind: str, name: str) -> Any:
    """The class registered as `name`; an unknown name fails with the nearest match."""
    _check_known(kind, name)
    return _load(kind, name, _rows(kind)[name])


@cache
def config_type(kind: str, name: str) -> Any:
    """The `Config` of the class registered as `name`; that class is not imported if OPTIONS names
    its options. An unknown name fails with the nearest match."""
    _check_known(kind, name)
    row = OPTIONS.get(kind, {}).get(name)
    return resolve(kind, name).Config if row is None else _load(kind, name, row)


def _check_known(kind: str, name: str) -> None:
    known = names(kind)
    if name not in known:
        raise unknown(_singular(kind), name, known)


def _load(kind: str, name: str, row: str) -> Any:
    module, _, attribute = row.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        raise MissingDependencyError(
            f"{kind} '{name}' needs the package '{error.name}', which is not installed; "
            "pip install 'embodied-stack[all]' brings everything"
        ) from error
