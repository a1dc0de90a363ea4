"""When a server that failed is asked again, by a clock that is moved by hand."""

from embodied.comms.channels import ErrorReply, Reply
from embodied.run.remote import messages as m
from embodied.run.remote.reachability import PROBE_EVERY_S, PROBE_WAIT_S, Reachability


class Link:
    """An end of a link whose other end is the test. connected: whether anything can be sent."""

    def __init__(self):
        self.connected, self.sent, self.waiting, self.now_s = True, 0, {}, 0.0

    def send(self, header, arrays):
        if not self.connected:
            return None
        self.sent += 1
        self.waiting[self.sent] = None
        return self.sent

    def receive_ready(self):
        ready = [Reply(k, v, {}) for k, v in self.waiting.items() if v is not None]
        self.waiting = {k: v for k, v in self.waiting.items() if v is None}
        return ready

    def forget(self, number):
        del self.waiting[number]

    def answer(self, ready=True):
        health = m.Health(ready, 1, 0, (), 0, 0, 0, 0.0, 0.0, "")
        self.waiting = dict.fromkeys(self.waiting, health)


def down(link, needed):
    found = Reachability(link, needed=needed, clock=lambda: link.now_s)
    found.failed()
    assert found.usable(), "one failure is no reason"
    found.succeeded()
    found.failed()
    assert found.usable(), "nor are two with a success between them"
    found.failed()
    link.now_s += PROBE_EVERY_S
    assert not found.usable() and link.sent == 1
    return found


def step(found, link, answer=lambda: None):
    """One probe is answered; whether the server is asked for decisions then."""
    answer()
    link.now_s += PROBE_EVERY_S
    return found.usable()


def test_a_server_comes_back_after_so_many_good_answers_in_a_row():
    link = Link()
    found = down(link, needed=3)
    assert [step(found, link, link.answer) for _ in range(3)] == [False, False, True]
    found.failed()
    assert found.usable(), "its former failures are forgotten"


def test_anything_but_a_good_answer_begins_the_count_anew():
    def unready():
        link.answer(ready=False)

    def refused():
        link.waiting = dict.fromkeys(link.waiting, ErrorReply("LinkError", "no"))

    def silent():
        link.now_s += PROBE_WAIT_S

    def gone():
        link.answer()
        link.connected = False
        assert not step(found, link) and not step(found, link)
        link.connected = True

    for spoil in (unready, refused, silent, gone):
        link = Link()
        found = down(link, needed=3)
        assert not step(found, link, link.answer)
        assert not step(found, link, spoil), spoil.__name__
        if not link.waiting:
            assert not step(found, link)
        answers = [step(found, link, link.answer) for _ in range(3)]
        assert answers == [False, False, True], spoil.__name__


def test_probes_are_few_and_none_is_left_behind():
    link = Link()
    found = down(link, needed=1)
    for _ in range(50):
        link.now_s += PROBE_EVERY_S / 50
        assert not found.usable()
    assert link.sent == 1, "one at a time"
    link.answer()
    assert found.usable() and not link.waiting


def test_rare_decisions_are_no_reason_to_stay_away():
    link = Link()
    found = down(link, needed=2)

    def answered_long_ago():
        link.answer()
        link.now_s += 5 * PROBE_WAIT_S

    assert not step(found, link, answered_long_ago)
    assert step(found, link, answered_long_ago)
