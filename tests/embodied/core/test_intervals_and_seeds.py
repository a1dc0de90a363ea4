import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied.core.errors import SpecError
from embodied.core.intervals import bootstrap_mean, paired_bootstrap, wilson
from embodied.core.seeds import derive_seed, make_rng
from embodied.core.specs import ArraySpec, DeviceSpec, PolicySpec


def test_wilson_matches_published_values():
    # Newcombe (1998), table I: 81 of 263 and 15 of 148.
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(wilson(15, 148), (0.0624, 0.1605), atol=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes in 2"):
        wilson(3, 2)


@given(st.integers(1, 200), st.data())
def test_wilson_contains_the_rate(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12 and successes / trials - 1e-12 <= high <= 1


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_mean(list(rng.exponential(1.0, 40)), resamples=400)
        covered += low <= 1.0 <= high
    assert 0.86 <= covered / 200 <= 0.99


def test_pairing_removes_what_the_pairs_share():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 10, 50)
    a, b = shared + 1 + rng.normal(0, 0.1, 50), shared + rng.normal(0, 0.1, 50)
    mean, low, high = paired_bootstrap(list(a), list(b))
    assert low < 1 < high and high - low < 0.2 and abs(mean - 1) < 0.1
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_seeds_are_named_not_counted():
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    assert len({derive_seed(r, n, i) for r in range(3) for n in "ab" for i in range(50)}) == 300
    a, b = make_rng(0, "x").random(4), make_rng(0, "y").random(4)
    assert not np.array_equal(a, b)


def test_specs_refuse_what_cannot_be():
    with pytest.raises(SpecError, match="low has 2 values"):
        ArraySpec((3,), low=(0.0, 1.0))
    with pytest.raises(SpecError, match="names"):
        ArraySpec((3,), names=("a",))
    with pytest.raises(SpecError, match="n_action_steps is 9"):
        PolicySpec({}, ArraySpec((1,)), n_obs_steps=1, horizon=8, n_action_steps=9)
    spec = DeviceSpec({"observation.state": ArraySpec((2,))}, ArraySpec((1,)), 10.0)
    with pytest.raises(SpecError, match=r"observation\.state has shape \(3,\)"):
        spec.check({"observation.state": np.zeros(3, np.float32)})
    with pytest.raises(SpecError, match="float64"):
        spec.check({"observation.state": np.zeros(2)})
    with pytest.raises(SpecError, match="keys"):
        spec.check({"observation.stat": np.zeros(2, np.float32)})
