"""What a run's autoencoder makes of pictures that it did not learn from."""

from dataclasses import dataclass

import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.learn.reconstruction import Reconstruction
from embodied.run.algorithm import make_algorithm
from embodied.run.build import make_reader, stored_policy
from embodied.run.config import TrainConfig

_PICTURES = 64


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """Pictures of one key, evenly spread over the held-out episodes: true and back are uint8
    [N, h, w, 3]. psnr_db: over all of them."""

    key: str
    true: np.ndarray
    back: np.ndarray
    psnr_db: float


def reconstruct(run: RunDir, config: TrainConfig) -> list[Reconstructed]:
    """Of each key that the last weights read; nothing if no episode was held out.

    ConfigError if the run trains no autoencoder.
    """
    import torch

    from policies.autoencoder.policy import VAE, psnr

    algorithm = make_algorithm(config.algorithm)
    policy, _, _ = stored_policy(run.path)
    if not isinstance(policy, VAE) or not isinstance(algorithm, Reconstruction):
        raise ConfigError(f"{run.path} trains no autoencoder; a run with policy=vae is right")
    torch.set_num_threads(config.learner.threads)
    found: list[Reconstructed] = []
    with make_reader(run, config) as reader:
        reader.refresh()
        kept = [episode.rows for episode in reader.finished() if algorithm.holds_out(episode)]
        if not kept:
            return []
        rows = np.concatenate(kept)
        count = min(len(rows), _PICTURES)
        rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
        for key in policy.spec.observation:
            true = reader.take(key, rows)
            back = policy.reconstruct(torch.from_numpy(true)).numpy()
            error = torch.from_numpy((back.astype(np.float32) - true) / 255)
            found.append(Reconstructed(key, true, back, psnr(error).item()))
    return found
