"""Many hosts ask one feed at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from weights import Pair, publish, update_of

from embodied.weights import feed as feed_module
from embodied.weights.store import VersionGoneError
from embodied.weights.wire import WantWeights, WeightsPiece


@pytest.fixture
def gate(monkeypatch):
    """While it is closed, encoding waits; `begun` says that one does."""
    opened, begun, encode = threading.Event(), threading.Event(), feed_module.encode_patch
    opened.begun = begun

    def gated(*arguments):
        begun.set()
        assert opened.wait(30)
        return encode(*arguments)

    monkeypatch.setattr(feed_module, "encode_patch", gated)
    opened.set()
    yield opened
    opened.set()


def test_an_update_is_encoded_once_for_all_who_ask_at_once(tmp_path, gate):
    pair = Pair(tmp_path)
    publish(pair)
    pair.sync()
    publish(pair)
    gate.clear()
    before, want = pair.feed.num_encoded, pair.mirror.next_request()
    with ThreadPoolExecutor(8) as hosts:
        asked = [hosts.submit(pair.feed.handle, want, {}) for _ in range(8)]
        assert gate.begun.wait(30)
        gate.set()
        updates = [update_of(each.result(30)) for each in asked]
    assert {(update.base_version, update.version) for update in updates} == {(1, 2)}
    assert pair.feed.num_encoded == before + 1


def test_hosts_without_a_usable_base_share_the_whole(tmp_path):
    pair = Pair(tmp_path)
    publish(pair, 2)
    for base, sha256 in ((None, None), (1, "0" * 64), (1, "1" * 64)):
        want = WantWeights(run_id="run", host="robot", base_version=base, base_sha256=sha256)
        # Version 1 is here, but not as that host has it.
        assert update_of(pair.feed.handle(want, {})).base_version is None
    assert pair.feed.num_encoded == 1


def test_a_long_encode_holds_up_no_other_hosts_transfer(tmp_path, gate):
    meant = {"robot": 1, "other": 2}
    pair = Pair(tmp_path, choose=lambda host: meant[host])
    publish(pair, 2)
    pair.talk(max_bytes=100)
    gate.clear()
    gate.begun.clear()
    with ThreadPoolExecutor(1) as other:
        waits = other.submit(pair.feed.handle, WantWeights(run_id="run", host="other"), {})
        assert gate.begun.wait(30)
        header, _ = pair.reply(max_bytes=100)
        assert isinstance(header, WeightsPiece) and not waits.done()
        gate.set()
        assert update_of(waits.result(30)).version == 2
    delivered = pair.feed.deliveries
    pair.sync()
    pair.reply()
    assert delivered.last("robot").version == 1 and delivered.last("other") is None


def test_what_could_not_be_made_is_tried_again(tmp_path):
    pair = Pair(tmp_path, choose=lambda host: 1)
    with pytest.raises(VersionGoneError):
        pair.reply()
    publish(pair)
    assert update_of(pair.reply()).version == 1
