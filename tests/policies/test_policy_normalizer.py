from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embodied.core.errors import ConfigError
from embodied.core.specs import ArraySpec
from policies.normalizer import LinearNormalizer, is_image


def stats(**values):
    return SimpleNamespace(**{"mean": [0.0], "std": [1.0], "min": [0.0], "max": [1.0], **values})


def test_limits_map_to_one_and_constants_are_only_shifted():
    n = LinearNormalizer((4,))
    n.set_statistics(
        stats(min=[-1.0, 5.0, 2.0, 1e6], max=[3.0, 5.0, 2.00001, 1e6 + 0.5]), "limits", "state"
    )
    x = torch.tensor([[-1.0, 5.0, 2.0, 1e6], [3.0, 6.0, 2.5, 1e6 + 2]])
    expected = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.5, 2.0]])
    torch.testing.assert_close(n.normalize(x), expected, atol=0.3, rtol=0)
    torch.testing.assert_close(n.normalize(x)[:, :3], expected[:, :3], atol=2e-5, rtol=0)
    assert n.scale.tolist() == [2.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(n.unnormalize(n.normalize(x)), x)


def test_gaussian_gives_mean_zero_and_deviation_one():
    n = LinearNormalizer((2,))
    n.set_statistics(stats(mean=[3.0, 7.0], std=[2.0, 0.0]), "gaussian", "state")
    torch.testing.assert_close(n.normalize(torch.tensor([[5.0, 7.5]])), torch.tensor([[1.0, 0.5]]))


def test_bounds_of_a_spec():
    n = LinearNormalizer((2,))
    n.set_bounds(ArraySpec((2,), low=(0.0, -4.0), high=(512.0, 4.0)), "action")
    torch.testing.assert_close(
        n.unnormalize(torch.tensor([[-1.0, -1.0], [1.0, 1.0]])),
        torch.tensor([[0.0, -4.0], [512.0, 4.0]]),
    )
    with pytest.raises(ConfigError, match=r"action: elements \[1\].*action_normalization"):
        n.set_bounds(ArraySpec((2,), low=(0.0, -4.0), high=(1.0, np.inf)), "action")


def test_statistics_that_do_not_fit_are_named():
    n = LinearNormalizer((2,))
    with pytest.raises(ConfigError, match=r"state.min has 1 values.*needs 2"):
        n.set_statistics(stats(), "limits", "state")
    with pytest.raises(ConfigError, match=r"state.std is not finite"):
        n.set_statistics(stats(mean=[0.0, 0.0], std=[1.0, np.nan]), "gaussian", "state")


def test_images_are_recognised():
    assert is_image("observation.images.front", ArraySpec((3, 8, 8)))
    assert is_image("observation.camera", ArraySpec((8, 8, 3), "uint8"))
    assert not is_image("observation.state", ArraySpec((8,)))
