"""Seeds derived by name, so that adding a consumer does not shift the others."""

import hashlib

import numpy as np


def derive_seed(root: int, *names: str | int) -> int:
    """A 63-bit seed that is a function of `root` and the path of names."""
    text = "/".join([str(root), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def make_rng(root: int, *names: str | int) -> np.random.Generator:
    """An independent generator for the path of names."""
    return np.random.Generator(np.random.PCG64(derive_seed(root, *names)))
