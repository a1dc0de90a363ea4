import json

import numpy as np
import pytest
from trials import RULE, play
from weights import CONFIG, network

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.weights.noninferiority import Count, difference_interval, judge
from embodied.weights.store import VersionGoneError, WeightStore, WeightWatcher
from embodied.weights.trial import Trial, TrialRule


def test_without_a_rule_everybody_gets_the_newest(store, tmp_path):
    trial = Trial(store)
    assert trial.offered("any") == 2
    assert trial.record(2, True) is None and trial.advance() is None
    assert Trial(WeightStore(tmp_path / "empty")).offered("any") is None


def test_a_new_version_acts_on_the_canary_until_it_is_promoted(store):
    trial = Trial(store)
    trial.start(RULE)
    store.publish(network(3), CONFIG)
    assert trial.advance() is None and trial.offered("canary") == 2  # no baseline yet
    play(trial, 2, 10, 8)
    event = trial.advance()
    assert event is not None and (event.what, event.version) == ("on trial", 3)
    store.publish(network(4), CONFIG)  # waits until the trial is decided
    assert trial.advance() is None
    trial = Trial(WeightStore(store.path))  # a new process
    assert (trial.offered("canary"), trial.offered("other")) == (3, 2)
    play(trial, 2, 30, 24)
    assert play(trial, 3, 19, 19) is None  # the first look is at 20
    event = trial.record(3, True)
    assert event is not None and (event.what, event.version) == ("promoted", 3)
    assert trial.offered("canary") == trial.offered("other") == 3
    assert trial.state().champion_count == Count()


def test_a_worse_version_is_rejected_undone_and_never_offered_again(store):
    trial = Trial(store)
    trial.start(RULE)
    store.publish(network(3), CONFIG)
    play(trial, 2, 40, 36)
    trial.advance()
    event = play(trial, 3, 20, 2)
    assert event is not None and (event.what, event.version, event.replacement) == (
        "rejected",
        3,
        4,
    )
    assert trial.offered("canary") == trial.offered("other") == 4
    arrays, manifest = store.load(4)
    assert manifest.metadata == {"step": 2, "rollback_of": 2}
    assert arrays["net.weight"].tobytes() == network(2)["net.weight"].tobytes()
    assert trial.state().rejected == (3,) and trial.advance() is None
    assert trial.state().champion_count == Count(40, 36)  # the same weights under a new number


def test_what_is_not_shown_by_the_last_look_is_rejected(store):
    trial = Trial(store)
    trial.start(RULE)
    store.publish(network(3), CONFIG)
    play(trial, 2, 10, 7)
    trial.advance()
    assert play(trial, 3, 39, 23) is None
    event = trial.record(3, False)
    assert event is not None and event.what == "rejected"


def test_episodes_of_other_versions_do_not_count(store):
    trial = Trial(store)
    trial.start(RULE)
    trial.record(1, True)
    trial.record(77, True)
    assert trial.state().champion_count == Count()


def test_versions_on_trial_outlive_pruning_and_are_let_go_after(store):
    trial = Trial(store)
    trial.start(RULE)
    store.publish(network(3), CONFIG)
    play(trial, 2, 10, 9)
    trial.advance()
    for seed in range(4, 9):
        store.publish(network(seed), CONFIG)
    store.prune(1)
    assert store.versions() == [2, 3, 8] and store.pinned() == [2, 3]
    play(trial, 3, 40, 40)
    store.prune(1)
    assert store.versions() == [3, 8]
    trial.stop()
    assert store.pinned() == [] and trial.offered("any") == 8


def test_rollback_publishes_the_old_arrays_as_the_newest(store):
    trial = Trial(store)
    watcher = WeightWatcher(store, choose=lambda: trial.offered("any"))
    assert watcher.poll()[1].version == 2
    assert trial.rollback(1).version == 3
    arrays, manifest = watcher.poll()
    assert manifest.version == 3 and arrays["steps"] == 1
    store.publish(network(5), CONFIG)
    assert watcher.poll()[1].version == 4
    with pytest.raises(VersionGoneError):
        trial.rollback(77)


def test_a_pin_holds_everybody_until_it_is_let_go(store):
    trial = Trial(store)
    watcher = WeightWatcher(store, choose=lambda: trial.offered("any"))
    watcher.poll()
    assert trial.pin(1) == 3
    store.publish(network(4), CONFIG)
    assert watcher.poll()[1].version == 3 and watcher.poll() is None
    assert trial.offered("any") == 3 and store.prune(1) == [2]
    with pytest.raises(ConfigError, match="1 is pinned"):
        trial.rollback(3)
    with pytest.raises(ConfigError, match="4 is not pinned; 1 is"):
        trial.unpin(4)
    trial.unpin(1)
    assert watcher.poll()[1].version == 4 and store.pinned() == []
    assert trial.pin(4) == 4 and trial.offered("any") == 4
    with pytest.raises(VersionGoneError):
        trial.pin(77)
    assert trial.state().pinned == 4


def test_a_trial_ends_undecided_when_a_person_steps_in(store):
    trial = Trial(store)
    trial.start(RULE)
    store.publish(network(3), CONFIG)
    play(trial, 2, 10, 9)
    trial.advance()
    assert trial.rollback(1).version == 4
    state = trial.state()
    assert (state.champion, state.challenger) == (4, None) and trial.advance() is None
    with pytest.raises(ConfigError, match="canary"):
        trial.start(TrialRule(canaries=()))


def test_a_damaged_state_is_named(store):
    path = store.path / "trial.json"
    for text in ("", "{", json.dumps({"champion": "2"}), json.dumps({"odd": 1})):
        path.write_text(text)
        with pytest.raises(CorruptDataError, match=str(path)):
            Trial(store).offered("any")


def test_newcombes_interval_has_the_published_value():
    lower, upper = difference_interval(Count(70, 56), Count(80, 48), level=0.025)
    assert (round(lower, 4), round(upper, 4)) == (0.0524, 0.3339)  # Newcombe 1998, table II (a)


LOOKS = (25, 50, 75, 100)


def share_promoted(new_rate, old_rate, baseline, trials=1500, **rule):
    rng = np.random.default_rng(7)
    promoted = 0
    for _ in range(trials):
        old = Count(baseline, int(rng.binomial(baseline, old_rate)))
        episodes = rng.random(LOOKS[-1]) < new_rate
        for look, at in enumerate(LOOKS):
            new = Count(at, int(episodes[:at].sum()))
            last = look == len(LOOKS) - 1
            verdict = judge(new, old, looks=len(LOOKS), last=last, **rule)
            if verdict != "undecided":
                promoted += verdict == "promote"
                break
    return promoted / trials


@pytest.mark.parametrize("baseline", [25, 100])
@pytest.mark.parametrize("old_rate", [0.3, 0.6, 0.95])
def test_a_version_worse_by_the_margin_is_promoted_less_often_than_stated(old_rate, baseline):
    rule = {"margin": 0.15, "error": 0.1}
    assert share_promoted(old_rate - 0.15, old_rate, baseline, **rule) < 0.1
    assert share_promoted(max(0, old_rate - 0.3), old_rate, baseline, **rule) < 0.01


@pytest.mark.parametrize(("rate", "power"), [(0.9, 0.94), (0.7, 0.72), (0.5, 0.65)])
def test_an_equal_version_is_promoted_as_often_as_stated(rate, power):
    assert abs(share_promoted(rate, rate, 100, margin=0.15, error=0.1) - power) < 0.04
