"""The study of compositions, in small, on the smallest task."""

import pytest

from benchmarks.study_compose.__main__ import report
from benchmarks.study_compose.pairs import (
    DIFFUSION,
    FLOW,
    MLP,
    NO_HISTORY,
    QUICK_BUDGET,
    Pair,
    Parent,
    Recipe,
    Table,
    table,
)
from benchmarks.study_compose.work import TimeUp, Work

TINY = ("+policy.network.width=16", "learner.batch_size=8")
PAIR = Pair(
    "pointmass",
    Parent(FLOW + MLP + TINY, 0, 3),
    Parent(DIFFUSION + MLP + NO_HISTORY + TINY, 1, 3),
)
TABLE = Table({"pointmass": Recipe(2, "success")}, {"p": PAIR}, QUICK_BUDGET, horizon=10)


class Asked:
    """Says that the time is up at one of the times it is asked."""

    def __init__(self):
        self.times, self.last = 0, 10**6

    def __call__(self):
        self.times += 1
        return self.times < self.last


def test_a_study_goes_on_where_it_was_stopped_and_reports(tmp_path, capsys):
    asked = Asked()
    work = Work(tmp_path, TABLE, "", 60.0, asked)
    work.parents("p")
    asked.last = asked.times + 3  # in the middle of the search
    with pytest.raises(TimeUp):
        work.compositions("p")
    assert work.scores("p") == {}
    asked.last = 10**6
    before = work.fingerprints("p")
    again = Work(tmp_path, TABLE, "", 60.0, asked)
    again.parents("p")
    assert again.fingerprints("p") == before and before[0].split()[1] != before[1].split()[1]
    again.compositions("p")
    scores = work.scores("p")
    assert set(scores) == {"a", "b", "composed", "double", "random"}
    assert {len(found) for found in scores.values()} == {QUICK_BUDGET.episodes}
    times = asked.times
    once_more = Work(tmp_path, TABLE, "", 60.0, asked)
    once_more.parents("p")
    once_more.compositions("p")
    assert asked.times == times, "nothing is done twice"
    report(work, ["p"])
    assert "| p |" in capsys.readouterr().out


def test_the_parents_differ_and_see_different_demonstrations():
    for name, pair in table(quick=False).pairs.items():
        assert pair.a.half != pair.b.half, name
        assert (pair.a.overrides, pair.a.keys) != (pair.b.overrides, pair.b.keys), name
    tasks = {pair.task for pair in table(quick=False).pairs.values()}
    assert len(tasks - {"pusht"}) >= 3
