import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.core.errors import LinkError
from embodied.run.remote.requests import Request
from embodied.run.serving.batcher import Batcher


class Hand:
    """A clock that is moved by hand."""

    now_s = 0.0

    def __call__(self):
        return self.now_s


def request(rows=1, committed=0):
    prefix = np.zeros((rows, committed, 2), np.float32) if committed else None
    return Request({}, np.zeros(rows, np.int64), None, prefix)


def make(clock, rows=4, max_wait_s=0.0, max_queued=64):
    return Batcher(rows, max_wait_s=max_wait_s, max_queued=max_queued, clock=clock)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2), st.integers(0, 2)), max_size=16))
def test_every_request_is_in_one_batch_of_its_kind_in_the_order_of_arrival(wanted):
    """wanted: rows and committed actions of each, and how many batches are taken after it."""
    batcher, submitted, taken = make(Hand()), [], []
    for rows, committed, batches in wanted:
        made = request(rows, committed)
        batcher.submit(made, 10.0)
        submitted.append(made)
        taken += [batcher.take(0.0) for _ in range(batches)]
    while batch := batcher.take(0.0):
        taken.append(batch)
    for batch in filter(None, taken):
        assert sum(waiting.request.rows for waiting in batch) <= 4
        assert len({waiting.request.committed for waiting in batch}) == 1
    order = [id(waiting.request) for batch in taken for waiting in batch]
    assert sorted(order) == sorted(map(id, submitted)) and len(batcher) == 0
    for kind in range(3):
        own = [id(made) for made in submitted if made.committed == kind]
        assert [number for number in order if number in own] == own


def test_a_batch_waits_for_others_until_it_is_full_or_old_enough():
    clock = Hand()
    batcher = make(clock, rows=2, max_wait_s=1.0)
    batcher.submit(request(), 10.0)
    assert batcher._next()[1] == 1.0
    clock.now_s = 1.0
    assert len(batcher.take(0.0)) == 1
    batcher.submit(request(), 10.0)
    batcher.submit(request(), 10.0)
    assert len(batcher.take(0.0)) == 2, "full, so it does not wait"
    batcher.submit(request(), 10.0)
    batcher.submit(request(rows=2), 10.0)
    assert len(batcher.take(0.0)) == 1, "what follows does not fit in"


def test_what_comes_too_late_or_is_too_much_is_told_so():
    clock = Hand()
    batcher = make(clock, max_queued=2)
    late, in_time = batcher.submit(request(), 0.5), batcher.submit(request(), 2.0)
    with pytest.raises(LinkError, match="2 requests wait already"):
        batcher.submit(request(), 9.0)
    clock.now_s = 1.0
    (waiting,) = batcher.take(0.0)
    assert waiting.future is in_time
    with pytest.raises(LinkError, match="dropped: waited 1000 ms and had 500 ms"):
        late.result(0)
    assert batcher.dropped == 2
    still = batcher.submit(request(), 9.0)
    batcher.close()
    for refused in (lambda: still.result(0), lambda: batcher.submit(request(), 9.0)):
        with pytest.raises(LinkError, match="ends"):
            refused()
