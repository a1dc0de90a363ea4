import pytest
import torch

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.registry import names
from policies.networks.time import SinusoidalTime

SMALL = {
    "mlp": {"width": 32, "depth": 2},
    "unet1d": {"channels": [8, 16, 16], "n_groups": 4, "time_dim": 16},
    "dit": {"width": 16, "depth": 2, "heads": 2, "time_dim": 16},
}


def build(name, action_dim=3, horizon=8, cond_dim=5):
    torch.manual_seed(0)
    cls, config = component("networks", {"name": name, **SMALL.get(name, {})}, "policy")
    return cls(config, action_dim, horizon, cond_dim)


def awaken(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("horizon", range(1, 10))
@pytest.mark.parametrize("name", names("networks"))
def test_every_horizon_keeps_its_shape(name, horizon):
    net = awaken(build(name, horizon=horizon))
    x = torch.randn(4, horizon, 3)
    out = net(x, torch.rand(4), torch.randn(4, 5))
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("name", names("networks"))
def test_starts_at_zero_and_every_parameter_learns(name):
    net = build(name)
    x, time, cond = torch.randn(16, 8, 3), torch.rand(16), torch.randn(16, 5)
    assert (net(x, time, cond) == 0).all()
    awaken(net)(x, time, cond).square().sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", names("networks"))
def test_rows_are_independent_and_see_all_their_inputs(name):
    net = awaken(build(name)).double()
    x, time, cond = (
        torch.randn(3, 8, 3).double(),
        torch.rand(3).double(),
        torch.randn(3, 5).double(),
    )
    base = net(x, time, cond)
    torch.testing.assert_close(net(x[1:2], time[1:2], cond[1:2])[0], base[1])
    for changed in (
        net(x + torch.eye(3).double()[0, :, None, None], time, cond),
        net(x, time + torch.tensor([0.01, 0, 0]), cond),
        net(x, time, cond + torch.eye(3).double()[0, :, None]),
    ):
        assert (changed[0] != base[0]).any()
        assert torch.equal(changed[1:], base[1:])


def test_unet_pads_by_repeating_the_last_step_and_crops_the_end():
    short, long = awaken(build("unet1d", horizon=5)), build("unet1d", horizon=8)
    long.load_state_dict(short.state_dict())
    x, time, cond = torch.randn(4, 5, 3), torch.rand(4), torch.randn(4, 5)
    padded = torch.cat([x, x[:, -1:].expand(4, 3, 3)], dim=1)
    assert torch.equal(short(x, time, cond), long(padded, time, cond)[:, :5])


def test_time_is_resolved_across_the_range():
    embed = SinusoidalTime(64)
    z = embed(torch.linspace(0, 1, 101))
    assert z.shape == (101, 64)
    # Neighbours on a grid of 100 diffusion steps are apart, and no two times coincide.
    distance = torch.cdist(z, z) + 99 * torch.eye(101)
    assert distance.min() > 0.5


def test_impossible_sizes_are_refused():
    for options, match in (
        ({"name": "unet1d", "kernel_size": 4}, "odd"),
        ({"name": "unet1d", "channels": [12]}, "n_groups=8"),
        ({"name": "unet1d", "channels": []}, "channels"),
        ({"name": "mlp", "width": 10**9}, "width"),
        ({"name": "mlp", "time_dim": 15}, "time_dim"),
    ):
        with pytest.raises(ConfigError, match=match):
            component("networks", options, "policy")


@pytest.mark.parametrize("options", [{"positions": "sinusoidal"}, {"qk_norm": True}])
def test_dit_variants_learn_and_tell_steps_apart(options):
    torch.manual_seed(0)
    cls, config = component("networks", {"name": "dit", **SMALL["dit"], **options}, "policy")
    net = awaken(cls(config, 3, 8, 5))
    x, time, cond = torch.randn(4, 1, 3).expand(4, 8, 3), torch.rand(4), torch.randn(4, 5)
    out = net(x, time, cond)
    assert (out[:, 1:] != out[:, :1]).any(dim=2).all()
    out.square().sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


def test_dit_blocks_begin_as_the_identity():
    net = build("dit")
    x, context = torch.randn(4, 8, 16), torch.randn(4, 16)
    for block in net.blocks:
        assert torch.equal(block(x, block.modulation(context)), x)


def test_of_some_of_a_dit_blocks_tokens_the_result_is_the_same():
    block = build("dit").blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, modulation = torch.randn(4, 8, 16), block.modulation(torch.randn(4, 16))
    torch.testing.assert_close(block(x, modulation, 3), block(x, modulation)[:, :3])
