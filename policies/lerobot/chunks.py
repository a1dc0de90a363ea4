"""Chunks of LeRobot's models whose noise depends on a row's seed alone.

Shapes: B batch, To history, H chunk, D action, Z latent.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from policies import noise

Batch = Mapping[str, Any]

IMAGES = "observation.images"
"""Where LeRobot's diffusion policy expects all cameras' pictures together."""


def draw(model: Any, batch: Batch, seeds: list[int], *, varied: bool) -> torch.Tensor:
    """Normalised chunks [B, H, D] of a batch as LeRobot's processors make it, one seed a row.

    varied: of a model that acts on one chunk for each observation, draw others too (ACT: the style
    from its prior in the place of 0). The model's mode and torch's random state stay as they are.
    """
    drawn = _DRAWN.get(model.name, _one_by_one)
    with mode(model, training=False):
        return drawn(model, batch, seeds, varied)


@contextmanager
def mode(model: torch.nn.Module, *, training: bool) -> Generator[None]:
    """Meanwhile the model trains, or acts; models change their own mode when they act."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Meanwhile torch's own random state, which LeRobot draws from, is that of the seed."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        yield


def _act(model: Any, batch: Batch, seeds: list[int], varied: bool) -> torch.Tensor:
    if not (varied and model.config.use_vae):
        return model.predict_action_chunk(batch)
    z_B1Z = noise.start_noise(seeds, 1, model.config.latent_dim)

    def style(_: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return z_B1Z[:, 0].to(inputs[0])

    hook = model.model.encoder_latent_input_proj.register_forward_pre_hook(style)
    try:
        return model.predict_action_chunk(batch)
    finally:
        hook.remove()


def _gather_images(model: Any, batch: Batch) -> dict[str, Any]:
    """The batch with all cameras' pictures together, [B, To, cameras, 3, height, width]."""
    keys = list(model.config.image_features)
    together = {IMAGES: torch.stack([batch[key] for key in keys], dim=-4)} if keys else {}
    return {**batch, **together}


def _diffusion(model: Any, batch: Batch, seeds: list[int], _: bool) -> torch.Tensor:
    inner, config = model.diffusion, model.config
    cond_BC = inner._prepare_global_conditioning(_gather_images(model, batch))
    shape = (config.horizon, config.action_feature.shape[0])
    chunk = inner.conditional_sample(
        len(seeds),
        global_cond=cond_BC,
        generator=noise.step_generators(seeds),
        noise=noise.start_noise(seeds, *shape).to(cond_BC),
    )
    return chunk[:, config.n_obs_steps - 1 :]


def _smolvla(model: Any, batch: Batch, seeds: list[int], _: bool) -> torch.Tensor:
    shape = (model.config.chunk_size, model.config.max_action_dim)
    start = noise.start_noise(seeds, *shape).to(batch["observation.state"].device)
    return model.predict_action_chunk(dict(batch), noise=start)


def _one_by_one(model: Any, batch: Batch, seeds: list[int], _: bool) -> torch.Tensor:
    """For models whose noise cannot be given: a row at a time under its own random state."""
    rows: list[torch.Tensor] = []
    for index, seed in enumerate(seeds):
        own = {key: value[index : index + 1] for key, value in batch.items()}
        model.reset()
        with seeded(seed, next(model.parameters()).device):
            rows.append(model.predict_action_chunk(own))
    return torch.cat(rows)


_DRAWN: dict[str, Callable[[Any, Batch, list[int], bool], torch.Tensor]] = {
    "act": _act,
    "diffusion": _diffusion,
    "smolvla": _smolvla,
}
