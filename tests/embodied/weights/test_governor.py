import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.weights.governor import GovernorConfig, LinkBudget, PublishGovernor


def run(governor, seconds, step_s, cost_s, now_s=0.0):
    """Learn for so many seconds of steps; the times (of steps) at which weights went out."""
    times, end_s = [], now_s + seconds
    while now_s < end_s:
        if governor.due:
            times.append(now_s)
            governor.published(cost_s)
        governor.stepped(step_s)
        now_s += step_s
    return times


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1e-3, 0.5), st.floats(1e-4, 2.0), st.integers(1, 300)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([0.01, 0.03, 0.2]),
)
def test_the_learner_never_loses_more_than_its_share(phases, share):
    governor = PublishGovernor(GovernorConfig(max_share=share))
    learned_s = spent_s = worst_s = 0.0
    for step_s, cost_s, steps in phases:
        for _ in range(steps):
            if governor.due:
                governor.published(cost_s)
                spent_s += cost_s
                worst_s = max(worst_s, cost_s)
            governor.stepped(step_s)
            learned_s += step_s
            assert spent_s <= share * learned_s + worst_s + 1e-9


def test_the_interval_converges_to_the_cost_over_the_share():
    governor = PublishGovernor(GovernorConfig(max_share=0.03))
    gaps = np.diff(run(governor, 600, step_s=0.05, cost_s=0.06))
    assert governor.interval_s == pytest.approx(2.0)
    assert np.abs(gaps[1:] - 2.0).max() <= 0.11  # a step more or less, and rounding


def test_the_interval_follows_a_change():
    governor = PublishGovernor(GovernorConfig(max_share=0.03))
    run(governor, 100, 0.05, 0.03)
    assert governor.interval_s == pytest.approx(1.0)
    gaps = np.diff(run(governor, 400, 0.05, 0.3))
    assert np.mean(gaps[-10:]) == pytest.approx(10.0, rel=0.05)
    gaps = np.diff(run(governor, 400, 0.05, 0.03))
    assert np.mean(gaps[-10:]) == pytest.approx(1.0, rel=0.1)


def test_link_and_robots_lengthen_the_interval():
    governor = PublishGovernor(GovernorConfig(max_share=0.5, link_share=0.5))
    governor.published(0.01)
    assert governor.interval_s == pytest.approx(0.02)
    governor.rolled_out(0.4)
    assert governor.interval_s == pytest.approx(0.4)
    governor.sent(5_000_000, 2_500_000)
    assert governor.interval_s == pytest.approx(4.0)
    gaps = np.diff(run(governor, 60, 0.05, 0.01))
    assert gaps == pytest.approx([4.0] * len(gaps), abs=0.06) and len(gaps) > 10


def test_the_first_weights_go_out_at_once_and_idle_time_is_not_saved_up():
    governor = PublishGovernor(GovernorConfig())
    assert governor.due
    governor.published(0.1)
    assert not governor.due
    governor.stepped(1e6)
    assert governor.due
    governor.published(0.1)
    assert not governor.due


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2), st.floats(1e4, 1e7)), min_size=2, max_size=60))
def test_weights_never_take_more_than_their_share_of_a_link(events):
    budget = LinkBudget(0.25)
    assert budget.allowed(0.0) is None and budget.bytes_s == float("inf")
    budget.measured(events[0][1])
    now_s, sent, limit = 0.0, 0, budget.bytes_s
    for wait_s, link_bytes_s in events:
        now_s += wait_s
        limit += budget.bytes_s * wait_s
        allowed = budget.allowed(now_s)
        budget.sent(allowed)
        sent += allowed
        assert sent <= limit + 1
        budget.measured(link_bytes_s)


def test_a_busy_link_is_used_to_its_share():
    budget = LinkBudget(0.5)
    budget.measured(1e6)
    sent = 0
    for tick in range(1000):
        allowed = budget.allowed(tick / 10)
        budget.sent(allowed)
        sent += allowed
    assert sent == pytest.approx(0.5 * 1e6 * 99.9, rel=0.01)
