"""A trial of weights on a running run: its gateway, two hosts, the command line."""

import re

import pytest
from sites import Learner, Robots, closing, until

from embodied.cli.main import main


@pytest.fixture
def site(tmp_path):
    """A run whose two hosts have version 2."""
    learner = Learner(tmp_path)
    hosts = [Robots(tmp_path, name, learner) for name in ("arm-1", "arm-2")]
    with closing(learner, *hosts):
        learner.publish(1.0)
        learner.publish(2.0)
        have(2, learner, *hosts)
        yield learner, *hosts


def have(version, learner, *hosts):
    until(lambda: all(host.version == version for host in hosts), learner, *hosts)


def command(learner, *words):
    return main(["weights", str(learner.run.path), *words])


def plays(host, episodes, successes):
    for number in range(episodes):
        host.ends(number < successes)


RULE = ("--episodes", "40", "--looks", "2", "--baseline", "10", "--margin", "0.3")


def test_an_accepted_version_is_for_all_also_after_a_restart_of_the_gateway(site, capsys):
    learner, one, two = site
    assert command(learner, "trial", "2", "--hosts", "arm-1", "--against", "1", *RULE) == 0
    assert "Version 2 is on trial, as version 4, on arm-1." in capsys.readouterr().out
    until(lambda: (one.version, two.version) == (4, 3), learner, one, two)
    plays(one, 12, 11)
    plays(two, 20, 17)
    counted = lambda: learner.look().trial.champion_count.episodes == 20  # noqa: E731
    until(counted, learner, one, two)
    learner.gateway.close()
    learner.start()
    two.link.close()
    two.start()  # it tells all of its episodes again
    until(lambda: len(learner.look().hosts) == 2, learner, one, two)
    told = learner.look().trial
    assert (told.challenger_count.episodes, told.champion_count.episodes) == (12, 20)
    assert command(learner, "show") == main(["status", str(learner.run.path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("v4 on arm-1, v3 on all others") == 2
    assert said.count("v4: 11 of 12 episodes succeeded (92%), judged at 20 of 40") == 2
    assert re.search(r"no worse so far: success rates differ by .* is no worse", said)
    plays(one, 8, 8)
    have(4, learner, one, two)
    assert [e["version"] for e in learner.run.events() if e["event"] == "weights promoted"] == [4]
    assert command(learner, "show") == 0
    assert "last trial: v4 promoted" in capsys.readouterr().out
    assert command(learner, "stop") == 0


def test_a_rejected_version_is_taken_back(site, capsys):
    learner, one, two = site
    learner.publish(3.0)
    have(3, learner, one, two)
    assert command(learner, "trial", "1", "--hosts", "arm-2", *RULE) == 0
    until(lambda: (one.version, two.version) == (3, 4), learner, one, two)
    plays(one, 15, 15)
    plays(two, 20, 3)
    have(5, learner, one, two)
    assert learner.store.load(5)[0]["w"][0] == 3.0
    assert command(learner, "show") == 0
    assert "v4 rejected; what acted before acts as v5" in capsys.readouterr().out


def test_a_trial_that_cannot_be_is_refused_with_what_would_be_right(site, capsys):
    learner, one, two = site
    until(lambda: len(learner.look().hosts) == 2, one, two)
    for words, text in (
        (("trial", "1"), "--hosts NAME,NAME"),
        (("trial", "1", "--hosts", "arm-7"), "arm-1"),
        (("trial", "1", "--hosts", "arm-1,arm-2"), "leave at least one out"),
        (("trial", "2", "--hosts", "arm-1"), "is what all robots have"),
        (("trial", "77", "--hosts", "arm-1"), "version 77 is not in"),
        (("trial", "1", "--hosts", "arm-1", "--margin", "2"), "margin"),
        (("pin", "1", "--hosts", "arm-1"), "--hosts belongs to trial"),
        (("show", "--baseline", "3"), "--baseline belongs to trial"),
        (("trial", "--hosts", "arm-1", "--against", "1"), "trial which version"),
    ):
        assert command(learner, *words) == 2
        assert text in " ".join(capsys.readouterr().err.split()), words
    assert learner.look().trial is None
    assert command(learner, "trial", "--hosts", "arm-1") == 0
    assert learner.look().trial.challenger is None
