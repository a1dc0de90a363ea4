"""Chunks that are faulty, stale, late, repeated, out of order or somebody else's."""

import time

import msgspec
import numpy as np
import pytest
from follower import FOLLOWER_SPEC, Follower
from hand import INFO, SAFETY, Hand, Link, check_trajectory, many_seeds, opened
from point import PointDriver

from embodied.core.errors import DeviceLostError, LeaseError
from embodied.core.frames import Chunk
from hal.device import Device
from hal.health import Health
from hal.safety.config import SafetyConfig

AGE_TICKS = round(SAFETY.max_obs_age_s * FOLLOWER_SPEC.tick_hz)
AHEAD_TICKS = round(SAFETY.max_ahead_s * FOLLOWER_SPEC.tick_hz)
DIRECT = SafetyConfig(start_tolerance=None, tracking_error=None)


@pytest.fixture
def wild_wall_clock(monkeypatch):
    """The wall clock jumps by an hour whenever it is read."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(time, "time", lambda: 1e9 + rng.choice([-3600, 3600]))
    monkeypatch.setattr(
        time, "time_ns", lambda: int(1e18) + int(rng.choice([-1, 1])) * 3600 * 10**9
    )


def test_ten_thousand_faulty_chunks_do_not_reach_the_motors():
    driver, rng = Follower(), np.random.default_rng(0)
    device = opened(driver, safety=msgspec.structs.replace(SAFETY, heartbeat_s=1e9))
    hand = Hand(device, rng)
    device.advance(3)
    moved = len(driver.setpoints)

    def poisoned(value):
        actions = np.full((4, 3), 0.5, np.float32)
        actions[rng.integers(4), rng.integers(3)] = value
        return {"actions_HD": actions}

    tick = device.tick
    faults = [
        lambda: poisoned(np.nan),
        lambda: poisoned(np.inf),
        lambda: poisoned(-np.inf),
        lambda: {"actions_HD": np.zeros((4, int(rng.choice([1, 2, 4, 7]))), np.float32)},
        lambda: {"actions_HD": np.zeros((0, 3), np.float32)},
        lambda: {"actions_HD": np.float32(0.5)},
        lambda: {"actions_HD": np.zeros((2, 3, 1), np.float32)},
        lambda: {"actions_HD": np.ones((4, 3), rng.choice(["int64", "bool", "uint8"]))},
        lambda: {"actions_HD": np.ones((4, 3), np.complex64)},
        lambda: {"actions_HD": np.full((4, 3), 0.5, np.float32)[: int(rng.integers(1, 4))],
                 "start_tick": tick - int(rng.integers(5, 2**40))},
        lambda: {"actions_HD": np.zeros((int(rng.integers(300, 900)), 3), np.float32)},
        lambda: {"obs_tick": tick + int(rng.integers(1, 2**40))},
        lambda: {"obs_tick": tick - int(rng.integers(16, 2**40))},
        lambda: {"valid_until_tick": tick - int(rng.integers(1, 2**40))},
        lambda: {"lease_token": hand.token + int(rng.integers(1, 9)) * int(rng.choice([-1, 1]))},
        lambda: {"seq": -int(rng.integers(0, 2**40))},
        lambda: {"epoch": -1},
    ]  # fmt: skip
    sent = 0
    for number in range(10_000):
        fault = {"actions_HD": np.full((4, 3), 0.5, np.float32)} | faults[number % len(faults)]()
        ticket = hand.send([[0.5] * 3], **fault)
        assert ticket.rejections and all(r.reason and r.code for r in ticket.rejections)
        assert not len(ticket.accepted_HD)
        sent += 1
    device.advance(tick + 50)
    still = driver.setpoints[moved]
    assert sent == 10_000 and all((p == still).all() for p in driver.setpoints[moved:])


def test_subnormal_numbers_are_commanded_as_zero():
    device = opened()
    hand = Hand(device, np.random.default_rng(0))
    ticket = hand.send(np.full((3, 3), 1e-41, np.float32))
    assert not ticket.rejections and (ticket.accepted_HD == 0).all()


def test_a_measurement_that_is_no_number_moves_nothing():
    driver = Follower(start=(np.nan, 0.0, 1.0))
    device = Device(driver, info=INFO, safety=SAFETY)
    with pytest.raises(DeviceLostError, match="not finite"):
        device.open()
    assert not driver.setpoints and device.info.health is Health.LOST


@many_seeds(50)
def test_old_reordered_and_repeated_chunks_are_refused_whatever_the_wall_clock_says(
    seeds, wild_wall_clock
):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        device = opened()
        hand = Hand(device, rng)
        chunks = []
        for _ in range(12):
            hand.seq += 1
            tick = device.tick
            actions = rng.uniform(hand.low, hand.high, (6, 3)).astype(np.float32)
            chunks.append(Chunk(tick, actions, tick, tick + 5, hand.seq, 0, hand.token))
            device.advance(tick + int(rng.integers(1, 4)))
            device.pulse(hand.token)
        order = rng.permutation(12)
        newest = -1
        for k in [*order, *order]:
            ticket = device.submit(chunks[k])
            if chunks[k].seq <= newest:
                assert ticket.rejections[0].code == "order"
            elif len(ticket.accepted_HD):
                newest = chunks[k].seq
                assert ticket.first_tick >= device.tick
            else:
                assert ticket.rejections


@many_seeds(50)
def test_what_is_stale_is_refused_and_what_is_not_is_taken(seeds, wild_wall_clock):
    codes = {"stale": 0, "expired": 0, "future": 0, "far": 0, "": 0}
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        hand = Hand(device, rng)
        device.advance(AGE_TICKS + 1)
        for _ in range(8):
            device.advance(tick := device.tick + int(rng.integers(1, 9)))
            age, horizon = int(rng.integers(-1, 2 * AGE_TICKS)), int(rng.integers(1, 30))
            start = tick + int(rng.choice([rng.integers(-9, 9), rng.integers(AHEAD_TICKS)]))
            until = tick + int(rng.integers(-2, 60))
            ticket = hand.send(
                hand.absurd(horizon), start_tick=start, obs_tick=tick - age, valid_until_tick=until
            )
            code = (
                ("expired" if until < tick else "")
                or ("stale" if age > AGE_TICKS else "")
                or ("future" if age < 0 else "")
                or ("far" if start + horizon > tick + AHEAD_TICKS else "")
            )
            codes[code] += 1
            count = max(0, min(start + horizon, until + 1) - max(tick, start)) if not code else 0
            assert len(ticket.accepted_HD) == count
            if code:
                assert [rejection.code for rejection in ticket.rejections] == [code]
            elif count:
                assert ticket.first_tick == max(tick, start)
        check_trajectory(driver.setpoints)
    assert all(codes.values()), codes


@many_seeds(50)
def test_every_action_is_executed_in_its_own_tick_or_never(seeds):
    """Each action names its tick and its chunk; the link repeats, delays, loses and reorders."""
    late = executed = 0
    for seed in seeds:
        driver, rng = PointDriver(), np.random.default_rng(seed)
        device = opened(driver, safety=DIRECT)
        link = Link(device, rng, lost=0.2, twice=0.2, longest_ticks=5)
        hand = Hand(device, rng, link=link)
        sent = {}
        while device.tick < 40:
            horizon = int(rng.integers(1, 9))
            start = device.tick + int(rng.integers(-3, 4))
            actions = rng.uniform(-1, 1, (horizon, 2)).astype(np.float32)
            hand.send(actions, start_tick=start, valid_until_tick=start + horizon - 1)
            sent.update({(hand.seq, start + k): action for k, action in enumerate(actions)})
            hand.advance(device.tick + int(rng.integers(1, 4)))
        frames = [frame for frame in device.frames(2)[:-1] if not frame.held]
        for frame in frames:
            np.testing.assert_array_equal(frame.action, sent[frame.seq, frame.tick])
        seqs = [frame.seq for frame in frames]
        assert seqs == sorted(seqs), "a chunk never comes back once a newer one has played"
        late += sum(ticket.late_ticks for _, ticket in link.tickets)
        executed += len(frames)
    assert late > len(seeds) and executed > 10 * len(seeds)


@many_seeds(50)
def test_the_loser_of_a_lease_cannot_command(seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        device = opened()
        first = Hand(device, rng)
        first.wander(4)
        second = Hand(device, rng)
        late = first.send(rng.uniform(first.low, first.high, (4, 3)))
        assert late.rejections[0].code == "token" and not len(late.accepted_HD)
        assert device.pulse(first.token) and not device.pulse(second.token)
        for token in (first.token, second.token):
            with pytest.raises(LeaseError, match="not newer"):
                device.grant(token, "thief")


@many_seeds(50)
def test_what_a_former_holder_sent_late_is_refused(seeds):
    fenced = 0
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        slow = Link(device, rng, twice=0.3, longest_ticks=40)
        first = Hand(device, rng, link=slow)
        first.wander(int(rng.integers(4, 20)))
        arrived, granted_tick = len(slow.tickets), device.tick
        if rng.random() < 0.5:
            device.revoke("its time is up")
        second = Hand(device, rng)
        second.submit, second.advance, second.seq = device.submit, slow.advance, 1000
        first.send(first.absurd(8))
        second.wander(45)
        codes = {ticket.rejections[0].code for _, ticket in slow.tickets[arrived:]}
        assert codes <= {"token"}
        fenced += len(slow.tickets) - arrived
        moved_by = {frame.seq for frame in device.frames(granted_tick)[:-1] if not frame.held}
        assert moved_by and all(seq == 1 or seq > 1000 for seq in moved_by)
        check_trajectory(driver.setpoints)
    assert fenced > len(seeds)


@many_seeds(1000)
def test_the_first_command_must_begin_where_the_arm_is(seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        low, high = FOLLOWER_SPEC.action.bounds()
        driver = Follower(start=rng.uniform(low, high))
        device = opened(driver)
        hand = Hand(device, rng)
        device.revoke("test")
        token = device.lease("next")
        here = device.latest().observation["observation.state"]
        offset = rng.uniform(-0.05, 0.05, 3)
        chunk = Chunk(device.tick, (here + offset)[None].astype(np.float32), device.tick,
                      device.tick, 1, 0, token)  # fmt: skip
        codes = [r.code for r in device.submit(chunk).rejections]
        far = float(np.abs(offset).max())
        if abs(far - SAFETY.start_tolerance) > 1e-4:
            assert codes == (["start"] if far > SAFETY.start_tolerance else [])
        assert hand.seq
