"""A learner's feed and a robot host's mirror, cut, restarted, deceived."""

import gc

import numpy as np
import pytest
from weights import CONFIG, Pair, network, publish, update_of

from embodied.comms.channels import RequestClient, RequestServer
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError
from embodied.weights.feed import Update, Version
from embodied.weights.mirror import WeightMirror
from embodied.weights.store import WeightStore, WeightWatcher
from embodied.weights.wire import (
    REPLIES,
    REQUESTS,
    WeightsOffer,
    WeightsPiece,
    WeightsRefusedError,
    WeightsUnchanged,
)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_versions_arrive_bit_for_bit_under_the_learners_numbers(tmp_path, precision):
    pair = Pair(tmp_path, precision)
    assert pair.sync() is None and pair.mirror.version is None
    watcher = WeightWatcher(WeightStore(tmp_path / "robot"))
    for count in (1, 1, 3):
        version = publish(pair, count, seed=count)
        adopted = pair.sync()
        assert adopted is not None and adopted.version == version
        assert adopted.config == CONFIG and adopted.metadata == {"step": count}
        pair.assert_mirrored(version)
        arrays, manifest = watcher.poll()
        assert manifest == adopted and arrays["net.weight"].dtype == np.float32
    assert pair.sync() is None and watcher.poll() is None
    pair.restart()
    assert pair.sync() is None
    publish(pair)
    assert update_of(pair.reply()).base_version == 5  # known again after the restart
    pair.sync()
    pair.assert_mirrored(6)


def test_an_update_is_small_and_the_same_for_all_hosts(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    pair.sync()
    whole = pair.feed.num_encoded
    publish(pair)
    update = update_of(pair.reply())
    assert (update.version, update.base_version, update.config, update.layout) == (2, 1, None, None)
    assert update.patch_bytes < update.num_bytes / 4
    second = WeightMirror(WeightStore(tmp_path / "other"), "run", host="other")
    for _ in range(3):
        pair.reply()
    assert pair.feed.num_encoded == whole + 1
    header, arrays = pair.feed.handle(second.next_request(), {})
    assert second.take(header, arrays, 0.0).version == 2


def test_what_a_learner_keeps_does_not_grow_with_its_versions(tmp_path):
    pair = Pair(tmp_path)
    kept = []
    for _ in range(2):
        for _ in range(20):
            publish(pair)
            pair.sync()
        kept.append(sum(type(one) in (Version, Update) for one in gc.get_objects()))
    assert kept[0] == kept[1] < 40


def test_a_transfer_cut_at_every_byte_goes_on_there(tmp_path):
    pair = Pair(tmp_path)
    pair.learner.publish({"w": np.zeros(64, np.float32)}, {})
    pair.sync()
    rng = np.random.default_rng(0)
    pair.learner.publish({"w": rng.normal(size=64).astype(np.float32)}, {})
    size = update_of(pair.reply()).patch_bytes
    assert size > 80
    for place in range(1, size):
        assert pair.talk(max_bytes=1) is None
        assert pair.mirror.version == 1 and pair.mirror.next_request().offset == place
        if place % 3 == 0:
            pair.restart()
            assert pair.mirror.transferring and pair.mirror.next_request().offset == place
        else:
            pair.reply(max_bytes=1)  # which is lost
    assert pair.talk(max_bytes=1).version == 2
    pair.assert_mirrored(2)


def test_a_cut_at_any_place_leaves_the_old_version_and_costs_no_byte_twice(tmp_path):
    for place in range(1, 10):
        pair = Pair(tmp_path / str(place))
        publish(pair)
        pair.sync()
        publish(pair)
        size = update_of(pair.reply()).patch_bytes
        taken = max(1, size * place // 10)
        pair.talk(max_bytes=taken)
        pair.restart()
        assert pair.acting()[0] == 1 and pair.mirror.next_request().offset == taken
        [piece] = pair.reply()[1].values()
        assert piece.size == size - taken
        assert pair.talk().version == 2


def test_a_restart_with_all_bytes_there_asks_for_the_last_again(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    reply = pair.reply()
    pair.talk(max_bytes=10)
    (tmp_path / "robot" / "incoming" / "patch.part").write_bytes(reply[1]["piece"].tobytes())
    pair.restart()
    assert pair.mirror.next_request().offset == update_of(reply).patch_bytes - 1
    assert pair.talk().version == 1


@pytest.mark.parametrize("name", ["patch.part", "offer.msgpack"])
def test_a_damaged_spool_costs_its_transfer_only(tmp_path, name):
    pair = Pair(tmp_path)
    publish(pair)
    pair.sync()
    publish(pair)
    pair.talk(max_bytes=60)
    path = tmp_path / "robot" / "incoming" / name
    whole = path.read_bytes()
    for at in range(0, len(whole), 31):
        path.parent.joinpath(name).write_bytes(
            whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        )
        pair.restart()
        for _ in range(3):
            try:
                pair.sync(max_bytes=4096)
            except (CorruptDataError, WeightsRefusedError):
                assert pair.mirror.version == 1
        pair.assert_mirrored(2)
        for file in ("versions/00000002.json",):
            (tmp_path / "robot" / file).unlink()
        pair.restart()
        assert pair.mirror.version == 1
        pair.talk(max_bytes=60)


def test_a_base_that_the_learner_lacks_or_has_otherwise_makes_it_send_the_whole(tmp_path):
    pair = Pair(tmp_path / "a")
    publish(pair)
    pair.sync()
    publish(pair, 3)
    pair.learner.prune(1)
    pair = Pair(tmp_path / "a", cache_bytes=1)  # the learner restarts
    assert update_of(pair.reply()).base_version is None
    pair.sync()
    pair.assert_mirrored(4)
    replaced = Pair(tmp_path / "b", cache_bytes=1)
    publish(replaced, 5, seed=7)
    header, arrays = replaced.feed.handle(pair.mirror.next_request(), {})
    assert update_of((header, arrays)).base_version is None
    other = Pair(tmp_path / "a", "float32")  # the learner restarts with another precision
    publish(other)
    assert update_of(other.reply()).base_version is None
    other.sync()
    other.assert_mirrored(5)


def test_other_shapes_dtypes_and_names_arrive_as_a_whole(tmp_path):
    pair = Pair(tmp_path)
    variants = [
        {"w": np.zeros((2, 3), np.float32)},
        {"w": np.zeros((3, 2), np.float32)},
        {"w": np.zeros((3, 2), np.float64)},
        {"v": np.zeros((3, 2), np.float64)},
        {"v": np.zeros((3, 2), np.float64), "lora": np.ones(2, np.float32)},
        {},
    ]
    for number, arrays in enumerate(variants, 1):
        pair.learner.publish(arrays, {"number": number})
        assert update_of(pair.reply()).base_version is None
        assert pair.sync().config == {"number": number}
        pair.assert_mirrored(number)


def test_the_newest_wins_but_a_transfer_that_ends_sooner_is_finished(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    whole = update_of(pair.reply()).patch_bytes
    pair.talk(max_bytes=100)
    publish(pair)  # as large: fewer bytes remain of the first
    header, _ = pair.reply(max_bytes=100)
    assert isinstance(header, WeightsPiece) and (header.version, header.newest) == (1, 2)
    pair.sync(max_bytes=whole // 2)
    assert pair.mirror.version == 1 and pair.mirror.staleness(0.0) == (float("inf"), 1)
    arrays = pair.learner.load(2)[0]
    arrays["net.weight"] = arrays["net.weight"] * 3 + 1
    pair.learner.publish(arrays, CONFIG)
    large = update_of(pair.reply()).patch_bytes
    pair.talk(max_bytes=50)
    pair.learner.publish(pair.learner.load(1)[0], CONFIG)  # next to nothing to send
    header, sent = pair.reply(max_bytes=50)
    assert isinstance(header, WeightsOffer) and update_of((header, sent)).version == 4
    assert update_of((header, sent)).patch_bytes < large - 50
    assert pair.sync().version == 4
    pair.assert_mirrored(4)


def test_a_publisher_faster_than_the_link_does_not_starve_the_host(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    size = update_of(pair.reply()).patch_bytes
    adopted = []
    for step in range(24):
        publish(pair, seed=step)
        done = pair.talk(max_bytes=size // 4)
        adopted += [done.version] if done else []
    assert len(adopted) > 3 and adopted == sorted(set(adopted)) and adopted[-1] > 18


def test_staleness_is_counted_from_the_last_confirmation(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    assert pair.mirror.staleness(5.0) == (float("inf"), 0)
    pair.now_s = 10.0
    pair.sync()
    assert pair.mirror.staleness(12.5) == (2.5, 0)
    pair.now_s = 20.0
    pair.sync()
    assert pair.mirror.staleness(20.0) == (0.0, 0)
    pair.mirror.take(WeightsUnchanged(1, "0" * 64), {}, 30.0)  # not what is here
    assert pair.mirror.staleness(30.0) == (10.0, 0)


def test_adopting_over_versions_of_its_own_is_refused(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    WeightStore(tmp_path / "robot").publish(network(5), CONFIG)
    with pytest.raises(ConfigError, match="their own folder"):
        pair.sync()
    assert WeightStore(tmp_path / "robot").versions() == [1]


def test_over_real_channels(tmp_path):
    pair = Pair(tmp_path)
    publish(pair)
    address = f"ipc://{tmp_path}/s"
    with (
        RequestServer(address, REQUESTS, pair.feed.handle) as server,
        RequestClient(address, REPLIES) as client,
    ):
        while not pair.mirror.version:
            while (number := client.send(pair.mirror.next_request(5000), {})) is None:
                client.wait(0.1)
            assert server.poll(5.0) == 1
            client.wait(5.0)
            [reply] = client.receive_ready()
            assert reply.id == number
            pair.mirror.take(reply.header, reply.arrays, 0.0)
        pair.assert_mirrored(1)
        stranger = WeightMirror(WeightStore(tmp_path / "c"), "other", host="robot")
        client.send(stranger.next_request(), {})
        assert server.poll(5.0) == 1
        client.wait(5.0)
        [reply] = client.receive_ready()
        with pytest.raises(EmbodiedError):
            raise reply.header.exception()
