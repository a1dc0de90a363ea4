import pytest
from trials import RULE, play
from weights import CONFIG, network

from embodied.core.errors import ConfigError
from embodied.weights.noninferiority import Count
from embodied.weights.progress import progress
from embodied.weights.store import VersionGoneError, WeightStore
from embodied.weights.trial import Trial


def test_a_chosen_version_is_tried_at_once_and_all_others_stay(store):
    trial = Trial(store)
    store.publish(network(3), CONFIG)
    assert trial.start(RULE, 1) == 4  # robots have 3 already: they get a copy
    store.publish(network(5), CONFIG)
    assert (trial.offered("canary"), trial.offered("other")) == (4, 3)
    assert store.load(4)[0]["steps"] == 1
    with pytest.raises(ConfigError, match="4 is on trial; stop that first"):
        trial.start(RULE, 2)
    assert play(trial, 4, 20, 19) is None, "no look before the others have their episodes"
    event = play(trial, 3, 10, 9)
    assert event is not None and (event.what, event.version) == ("promoted", 4)
    assert trial.state().decided == event and trial.offered("other") == 4
    assert trial.advance() is None and play(trial, 4, 10, 9) is None
    assert trial.advance().version == 5


def test_others_can_be_sent_back_to_what_it_is_compared_with(store):
    trial = Trial(store)
    with pytest.raises(ConfigError, match="2 is what all robots have"):
        trial.start(RULE, 2)
    assert trial.start(RULE, 2, against=1) == 4
    assert (trial.offered("canary"), trial.offered("other")) == (4, 3)
    assert [store.load(v)[0]["steps"] for v in (3, 4)] == [1, 2]
    play(trial, 3, 10, 10)
    event = play(trial, 4, 40, 0)
    assert event is not None and (event.what, event.replacement) == ("rejected", 5)
    assert trial.offered("canary") == 5 and store.load(5)[0]["steps"] == 1


def test_a_pin_gives_way_to_a_trial_and_what_was_pinned_stays(store):
    trial = Trial(store)
    held = trial.pin(1)
    store.publish(network(4), CONFIG)
    assert trial.start(RULE, 4) == 4
    assert (trial.offered("canary"), trial.offered("other")) == (4, held)
    with pytest.raises(VersionGoneError):
        Trial(store).start(RULE, 77) if trial.stop() is None else None
    assert trial.offered("other") == 4 and trial.state().rule is None


def test_while_a_trial_begins_nobody_is_offered_anything_else(store, monkeypatch):
    trial, offered = Trial(store), []
    publish = WeightStore.publish

    def watched(*arguments):
        made = publish(*arguments)
        offered.append((trial.offered("canary"), trial.offered("other")))
        return made

    monkeypatch.setattr(WeightStore, "publish", watched)
    trial.start(RULE, 2, against=1)
    assert offered == [(2, 2), (3, 3)]  # what acted; then both what others get


def test_results_count_once_however_often_they_are_told(store):
    trial = Trial(store)
    assert trial.tell("a", 0, [(2, True)]) == [] and not (store.path / "trial.json").exists()
    trial.start(RULE, 1)
    results = [(2, True)] * 6 + [(3, False)] * 4
    for _ in range(2):
        assert trial.tell("a", 5, results) == []
        trial = Trial(WeightStore(store.path))  # a new process
    assert trial.tell("a", 0, [(2, True)] * 16) == []
    assert trial.tell("b", 0, [(2, False)] * 3) == []
    state = trial.state()
    assert (state.champion_count, state.challenger_count) == (Count(10, 7), Count(4, 0))
    assert state.counted == {"a": 16, "b": 3}
    events = trial.tell("b", 3, [(3, False)] * 40)
    assert [event.what for event in events] == ["rejected"]


def test_progress_says_what_the_rule_would(store):
    trial = Trial(store)
    assert progress(trial.state()) is None
    trial.start(RULE, 1)
    stands = progress(trial.state())
    assert (stands.champion, stands.challenger, stands.verdict) == (2, 3, None)
    trial.tell("a", 0, [(2, True)] * 9 + [(3, True)] * 12)
    stands = progress(trial.state())
    assert (stands.next_look, stands.challenger_count) == (20, Count(12, 12))
    assert stands.verdict == "promote" and stands.interval[0] > -RULE.margin
    trial.tell("b", 0, [(3, False)] * 12)
    assert progress(trial.state()).verdict == "undecided"
