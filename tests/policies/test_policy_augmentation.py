import colorsys

import pytest
import torch

from policies.augmentation import LUMA, ColourJitter, Crop, turn_hue

KEY = "observation.images.top"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def places(batch=4, steps=2, height=9, width=7):
    """Pictures that say at each pixel where it is: channel 0 the row, 1 the column, 2 the rows'."""
    x = torch.zeros(batch, steps, height, width, 3, dtype=torch.uint8)
    x[..., 0] = torch.arange(height)[:, None]
    x[..., 1] = torch.arange(width)
    x[..., 2] = (10 * torch.arange(batch)[:, None] + torch.arange(steps))[:, :, None, None]
    return x


def test_without_a_generator_the_centre_is_cut():
    (out,) = Crop({KEY: (5, 3)})({KEY: places()}, None).values()
    assert out.dtype == torch.uint8 and out.shape == (4, 2, 3, 5, 3)
    assert torch.equal(out, places().permute(0, 1, 4, 2, 3)[..., 2:7, 2:5])


def test_random_windows_are_whole_windows_one_a_row_for_all_its_steps():
    crop = Crop({KEY: (5, 3)})
    (out,) = crop({KEY: places(64)}, rng()).values()
    top, left = out[:, 0, 0, 0, 0].long(), out[:, 0, 1, 0, 0].long()
    steps = torch.arange(2)
    expected_rows = top[:, None, None, None] + torch.arange(5)[:, None]
    expected_columns = left[:, None, None, None] + torch.arange(3)
    assert torch.equal(out[:, :, 0].long(), expected_rows.expand(64, 2, 5, 3))
    assert torch.equal(out[:, :, 1].long(), expected_columns.expand(64, 2, 5, 3))
    names = (10 * torch.arange(64)[:, None] + steps).to(torch.uint8)
    assert torch.equal(out[:, :, 2], names[..., None, None].expand(64, 2, 5, 3))
    again, other = (crop({KEY: places(64)}, rng(seed))[KEY] for seed in (0, 1))
    assert torch.equal(again, out) and not torch.equal(other, out)


def test_every_place_is_as_likely():
    (out,) = Crop({KEY: (5, 3)})({KEY: places(5000, 1)}, rng()).values()
    for channel in (0, 1):
        counts = torch.bincount(out[:, 0, channel, 0, 0].long(), minlength=5)
        assert len(counts) == 5 and (counts - 1000).abs().max() < 4 * (1000 * 0.8) ** 0.5


def test_a_window_as_large_as_the_picture_draws_nothing():
    generator = rng()
    (out,) = Crop({KEY: (9, 7)})({KEY: places()}, generator).values()
    assert torch.equal(out, places().permute(0, 1, 4, 2, 3))
    assert torch.equal(generator.get_state(), rng().get_state())


def pictures(batch=400, steps=2):
    """Colours in the middle, so that nothing is cut off at 0 or 1."""
    return 0.4 + 0.2 * torch.rand(batch, steps, 3, 4, 5, generator=rng(7))


def luma(x):
    return (x * torch.tensor(LUMA)[:, None, None]).sum(dim=2)


def test_brightness_scales_each_row_by_its_own_uniform_factor():
    x = pictures(2000)
    out = ColourJitter(brightness=0.3)({KEY: x}, rng())[KEY]
    factor = (out / x).flatten(1)
    assert (factor.amax(1) - factor.amin(1)).max() < 1e-4
    factor = factor[:, 0]
    assert factor.min() < 0.705 and factor.max() > 1.295
    assert factor.mean().item() == pytest.approx(1, abs=4 * 0.3 / 3**0.5 / 2000**0.5)
    assert factor.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.05)


def test_contrast_keeps_the_mean_brightness_of_a_frame_and_scales_around_it():
    x = pictures()
    out = ColourJitter(contrast=0.4)({KEY: x}, rng())[KEY]
    mean = luma(x).mean(dim=(2, 3))
    torch.testing.assert_close(luma(out).mean(dim=(2, 3)), mean)
    middle = mean[..., None, None, None]
    factor = ((out - middle) * (x - middle)).sum((1, 2, 3, 4)) / (x - middle).square().sum(
        (1, 2, 3, 4)
    )
    torch.testing.assert_close(out, middle + factor[:, None, None, None, None] * (x - middle))
    assert 0.6 <= factor.min() < 0.62 and 1.38 < factor.max() <= 1.4


def test_saturation_and_hue_keep_brightness_and_leave_grey_alone():
    x = pictures()
    grey = x[:, :, :1].expand_as(x)
    for jitter in (ColourJitter(saturation=0.5), ColourJitter(hue=0.1)):
        out = jitter({KEY: x}, rng())[KEY]
        assert (out - x).abs().amax((1, 2, 3, 4)).median() > 0.01
        torch.testing.assert_close(luma(out), luma(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(jitter({KEY: grey}, rng())[KEY], grey, atol=1e-5, rtol=0)


def test_hue_turns_as_the_colour_wheel_does():
    """A third of a turn of a weak red is a weak green or blue; a whole one is nothing."""
    red = torch.tensor([0.55, 0.5, 0.5])
    for share, expected in ((1 / 3, 1 / 3), (-1 / 3, 2 / 3)):
        (matrix,) = turn_hue(torch.tensor([2 * torch.pi * share]))
        hue = colorsys.rgb_to_hsv(*(matrix @ red).tolist())[0]
        assert min(abs(hue - expected), abs(hue - (1 - expected))) < 0.08
    torch.testing.assert_close(turn_hue(torch.tensor([2 * torch.pi]))[0], torch.eye(3))
    one, two = turn_hue(torch.tensor([0.3])), turn_hue(torch.tensor([0.6]))
    torch.testing.assert_close(one @ one, two)


def test_jitter_stays_in_range_is_repeatable_and_off_in_inference():
    x = torch.rand(50, 2, 3, 4, 5, generator=rng(1))
    jitter = ColourJitter(0.8, 0.8, 0.8, 0.5)
    out = jitter({KEY: x}, rng())[KEY]
    assert out.min() >= 0 and out.max() <= 1 and (out != x).any(dim=4).any(3).any(2).any(1).all()
    assert torch.equal(jitter({KEY: x}, rng())[KEY], out)
    assert torch.equal(jitter({KEY: x}, None)[KEY], x)
    generator = rng()
    assert torch.equal(ColourJitter()({KEY: x}, generator)[KEY], x)
    assert torch.equal(generator.get_state(), rng().get_state())
