"""Holders that fall silent, links that break, chunks that end: the arm stops, in bounded time.

Each prints how long the arm took to stand still beside the bound, so that a margin that shrinks
is seen before it is gone.
"""

import numpy as np
from follower import Follower
from hand import (
    SAFETY,
    STEP_S,
    TICK_S,
    Hand,
    Link,
    check_trajectory,
    many_seeds,
    opened,
    poisoned,
    report,
    standstill_s,
    stopping_s,
)

SILENT_S = SAFETY.heartbeat_s + SAFETY.committed_ticks * TICK_S + stopping_s()
HEARTBEAT_TICKS = round(SAFETY.heartbeat_s / TICK_S)


@many_seeds(80)
def test_a_silent_holder_stops_the_arm(seeds, capsys):
    times_s = []
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        hand = Hand(device, rng, horizon=int(rng.integers(2, 200)))
        hand.wander(int(rng.integers(2, 12)))
        silent_from = len(driver.setpoints)
        device.advance(device.tick + round((SILENT_S + 0.2) / TICK_S))
        times_s.append(standstill_s(driver.setpoints, silent_from))
        check_trajectory(driver.setpoints)
        assert device.pulse(hand.token), "the lease is over: only a new one moves the arm"
        assert hand.send(np.zeros((2, 3))).rejections[0].code == "held"
    report(capsys, "holder silent", times_s, SILENT_S)


@many_seeds(80)
def test_chunks_that_stop_coming_end_in_a_hold(seeds, capsys):
    times_s = []
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        hand = Hand(device, rng)
        hand.wander(int(rng.integers(2, 10)))
        ticket = hand.send(rng.uniform(hand.low, hand.high, (int(rng.integers(1, 6)), 3)))
        last_tick = ticket.first_tick + len(ticket.accepted_HD)
        device.advance(last_tick)
        committed_until = len(driver.setpoints)
        device.advance(last_tick + round(stopping_s() / TICK_S) + 5)
        times_s.append(standstill_s(driver.setpoints, committed_until - 2))
        check_trajectory(driver.setpoints)
        assert not device.pulse(hand.token), "an underrun is no loss of the lease"
        assert all(frame.held for frame in device.frames(last_tick)[:-1])
    report(capsys, "chunks ended", times_s, stopping_s() + STEP_S)


@many_seeds(80)
def test_chunks_without_one_good_value_stop_the_arm_like_none(seeds, capsys):
    times_s = []
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        hand = Hand(device, rng)
        hand.wander(int(rng.integers(2, 12)))
        hand.send(hand.absurd(8))
        last_tick = device.tick + 8
        while device.tick < last_tick + round(stopping_s() / TICK_S) + 5:
            actions = hand.absurd(int(rng.integers(1, 30)))
            ticket = hand.send(poisoned(actions, rng))
            assert ticket.rejections[0].code == "nonfinite" and not len(ticket.accepted_HD)
            device.advance(device.tick + int(rng.integers(1, 7)))
        times_s.append(standstill_s(driver.setpoints, 2 * last_tick - 2))
        check_trajectory(driver.setpoints)
        assert not device.pulse(hand.token), "they are signs of life"
    report(capsys, "only faulty chunks", times_s, stopping_s() + STEP_S)


@many_seeds(80)
def test_a_broken_link_lets_what_is_committed_play_then_the_arm_holds(seeds, capsys):
    times_s, lost_s = [], []
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        link = Link(device, rng)
        hand = Hand(device, rng, link=link)
        hand.wander(int(rng.integers(2, 30)))
        underway = [chunk for *_, chunk in link.underway]
        last = hand.chunk(hand.absurd(int(rng.integers(60, 200))))
        taken = device.submit(last)
        silent_tick, silent_from = device.tick, len(driver.setpoints)
        assert len(taken.accepted_HD)
        while "heartbeats lost" not in device.info.counts:
            device.advance(device.tick + 1)
        lost_tick = device.tick - 1
        lost_s.append((lost_tick - silent_tick) * TICK_S)
        for chunk in underway:
            assert device.submit(chunk).rejections[0].code == "held", "it comes too late"
        device.advance(lost_tick + round(stopping_s() / TICK_S) + 6)
        frames = device.frames(silent_tick)[:-1]
        committed = lost_tick + SAFETY.committed_ticks
        played = [frame.tick for frame in frames if not frame.held]
        assert played == list(range(silent_tick, committed)), "these and no more"
        assert {frame.seq for frame in frames if not frame.held} == {last.seq}
        times_s.append(standstill_s(driver.setpoints, silent_from))
        check_trajectory(driver.setpoints)
        resting = driver.setpoints[-1]
        device.advance(device.tick + 20)
        assert (driver.setpoints[-1] == resting).all(), "it holds"
    report(capsys, "link broken", lost_s, SAFETY.heartbeat_s, "noticed")
    report(capsys, "link broken", times_s, SILENT_S)


@many_seeds(80)
def test_heartbeats_keep_a_lease_only_if_none_is_late(seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        device = opened()
        hand = Hand(device, rng)
        gaps = rng.integers(1, HEARTBEAT_TICKS + 1, 12)
        broken = int(rng.integers(0, 12))
        gaps[broken] = HEARTBEAT_TICKS + int(rng.integers(2, 40))
        for k, gap in enumerate(gaps):
            device.advance(device.tick + int(gap))
            assert bool(device.pulse(hand.token)) == (k >= broken), "and it stays over"
        assert not device.pulse(device.lease("the next"))


@many_seeds(80)
def test_whatever_the_link_does_the_motion_stays_within_its_limits(seeds):
    arrived = refused = moved = 0
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        lost, twice, spoilt = rng.uniform(0, 0.5, 3)
        link = Link(device, rng, lost=lost, twice=twice, spoilt=spoilt, longest_ticks=10)
        Hand(device, rng, link=link).wander(50)
        arrived += len(link.tickets)
        refused += sum(bool(ticket.rejections) for _, ticket in link.tickets)
        check_trajectory(driver.setpoints)
        moved += standstill_s(driver.setpoints, 0) > 0
    assert 0 < refused < arrived and moved > 0.9 * len(seeds)
