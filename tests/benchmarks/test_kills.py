"""The chaos run of benchmarks/links/kills.py: processes of a run across a network are killed."""

import pytest

from benchmarks.links.chaos.faults import FAULTS, sequence
from benchmarks.links.chaos.recovery import Recovery
from benchmarks.links.chaos.run import suffer
from benchmarks.links.kills import table


def test_every_kind_of_fault_comes_equally_often_and_never_three_times_in_a_row():
    kinds = [fault.name for fault in sequence(5 * len(FAULTS), seed=7)]
    assert {kinds.count(fault.name) for fault in FAULTS} == {5}
    assert all(len(set(kinds[at : at + 3])) > 1 for at in range(len(kinds) - 2))
    assert sequence(20, seed=7) == sequence(20, seed=7) != sequence(20, seed=8)


def recovery(kind, back_s, control_s=None):
    return Recovery(
        kind=kind,
        at_s=0.0,
        back_s=back_s,
        link_s=None,
        control_s=control_s,
        step_s=back_s,
        learn_s=None,
        stop_s=0.5,
        speed_rad_s=1.0,
        jump_rad=0.02,
        kept=True,
        halted="",
        faults=(),
    )


def test_the_table_has_a_row_for_each_kind_and_one_for_all():
    said = table(
        [recovery("actor", 4.0, 3.0), recovery("buffer", 2.0), recovery("actor", 12.0, 5.0)]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["actor", "2"], ["buffer", "1"], ["all", "3"]]
    assert rows[0][2:] == ["8.0", "11.9", "12.0", "1", "", "5.0", "12.0", "", "0.5"]
    assert rows[1][-1] == "" and rows[2][4:6] == ["12.0", "1"]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_eight_kills(tmp_path):
    """A seed that leaves out the learner and its supervisor, which load for long."""
    seen = []
    account = suffer(tmp_path / "kills", 8, seed=1004, timeout_s=120.0, report=seen.append)
    assert account.faults == () and list(account.recoveries) == seen
    kinds = {one.kind for one in seen}
    assert kinds == {"actor", "spool", "link", "site", "servo", "gateway", "buffer", "torn"}
    assert account.steps > 100 and account.published > 1
    assert account.compared > 0
