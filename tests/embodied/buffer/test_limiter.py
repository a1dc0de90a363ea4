import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied.buffer.sample.limiter import RateLimiter
from embodied.core.errors import ConfigError, CorruptDataError


@given(
    ratio=st.floats(0.05, 50),
    min_inserted=st.integers(0, 50),
    batch=st.integers(1, 64),
    insertion=st.integers(1, 16),
    order=st.lists(st.booleans(), max_size=300),
)
def test_the_ratio_stays_in_its_band_and_nobody_starves(
    ratio, min_inserted, batch, insertion, order
):
    slack = max((batch + ratio * insertion) / 2, (1 + ratio) / 2)
    limiter = RateLimiter(ratio, min_inserted, slack)
    inserted = sampled = 0
    for sample_first in order:
        can_sample, can_insert = limiter.can_sample(batch), limiter.can_insert(insertion)
        assert can_sample or can_insert
        assert not can_sample or inserted >= min_inserted
        if can_sample and (sample_first or not can_insert):
            limiter.sampled(batch)
            sampled += batch
        elif inserted < min_inserted or can_insert:
            limiter.inserted(insertion)
            inserted += insertion
        if inserted >= min_inserted:
            due = ratio * (inserted - min_inserted) - sampled
            assert -slack - 1e-6 <= due <= max(slack, ratio * insertion) + 1e-6


def test_formula_at_its_edges():
    limiter = RateLimiter(2.0, min_inserted=10, slack=4.0)
    assert limiter.can_insert(1000) and not limiter.can_sample(1)
    limiter.inserted(10)
    assert limiter.can_sample(4) and not limiter.can_sample(5)
    assert limiter.can_insert(2) and not limiter.can_insert(3)
    limiter.inserted(2)
    assert limiter.can_sample(8) and not limiter.can_insert(1)
    limiter.sampled(8)
    assert not limiter.can_sample(1) and limiter.can_insert(4)


def test_unlimited():
    limiter = RateLimiter(None, min_inserted=3)
    assert not limiter.can_sample(1) and limiter.can_insert(10**9)
    limiter.inserted(3)
    assert limiter.can_sample(10**9) and limiter.can_insert(10**9)


def test_save_and_load():
    limiter = RateLimiter(2.0, 1, 4.0)
    limiter.inserted(5)
    limiter.sampled(3)
    other = RateLimiter(2.0, 1, 4.0)
    other.load(limiter.save())
    assert other.balance == limiter.balance == 5.0
    for bad in ({}, {"inserted": -1, "sampled": 0}, {"inserted": 1.5, "sampled": 0}):
        with pytest.raises(CorruptDataError):
            other.load(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1, 4.0), "must be positive"),
        ((float("nan"), 1, 4.0), "must be positive"),
        ((4.0, 1, 2.0), "at least 2.5"),
        ((4.0, 1, float("nan")), "at least 2.5"),
        ((1.0, -1, 4.0), "min_inserted"),
    ],
)
def test_unusable_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RateLimiter(*arguments)
