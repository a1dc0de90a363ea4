"""The bandwidth cap and the window, on a clock of their own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied.comms.links.pacing import Cap, Window
from embodied.core.errors import ConfigError


@given(
    st.floats(1e3, 1e9),
    st.lists(st.tuples(st.integers(1, 1 << 18), st.floats(0, 1)), min_size=1, max_size=50),
)
def test_no_more_than_the_cap_and_a_burst_passes(rate, steps):
    cap, now_s, passed = Cap(rate, 0.0), 0.0, 0
    for nbytes, pause_s in steps:
        now_s += pause_s
        now_s += cap.wait_s(now_s) * (1 + 1e-9) + 1e-9
        assert cap.wait_s(now_s) == 0
        assert passed <= rate * (now_s + 0.051) + 1 or passed <= 1 << 18
        cap.spend(min(nbytes, int(rate * 0.05) + 1), now_s)
        passed += min(nbytes, int(rate * 0.05) + 1)
    assert passed <= rate * (now_s + 0.11) + len(steps)


def test_urgent_messages_are_made_up_for_but_not_for_ever():
    cap = Cap(1000.0, 0.0)
    cap.spend(550, 0.0)
    assert cap.wait_s(0.0) == pytest.approx(0.5)
    cap.spend(1_000_000, 0.0)
    assert cap.wait_s(0.0) == pytest.approx(1.0)
    assert cap.wait_s(1.5) == 0
    with pytest.raises(ConfigError, match="above 0"):
        Cap(0, 0.0)


def simulate(rate, delay_s, seconds, quantum_s=0.001):
    """A sender that always has something to send over a link with a queue; (share of the link
    that was used, longest queue in s) of the second half."""
    window, now_s = Window(), 0.0
    free_s, arrivals, used, longest_s = 0.0, [], 0, 0.0
    while now_s < seconds:
        while arrivals and arrivals[0][0] <= now_s:
            assert window.acknowledge(arrivals.pop(0)[1], now_s)
        while window.open:
            nbytes = window.piece_bytes(1 << 20)
            window.send(nbytes, now_s)
            free_s = max(free_s, now_s) + nbytes / rate
            arrivals.append((free_s + delay_s, window.sent))
            if now_s > seconds / 2:
                used += nbytes
                longest_s = max(longest_s, free_s - now_s)
        now_s += quantum_s
    return used / (rate * seconds / 2), longest_s


@pytest.mark.parametrize(
    "rate,delay_s",
    [(2.5e6, 0.2), (6.25e6, 0.04), (125e6, 0.001)],
    ids=["bad 4G", "cross-city", "LAN"],
)
def test_the_link_is_busy_and_the_queue_short(rate, delay_s):
    busy, queue_s = simulate(rate, delay_s, 20.0)
    assert busy > 0.6
    assert queue_s < 0.3, "and an urgent message waits no longer"


def test_acknowledgements_that_cannot_be_are_refused():
    window = Window()
    window.send(100, 0.0)
    assert not window.acknowledge(101, 1.0)
    assert window.acknowledge(100, 1.0)
    assert not window.acknowledge(99, 1.0)
