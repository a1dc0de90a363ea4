"""Of what batches take from the run's own steps, demonstrations have the share asked for."""

import numpy as np
import pytest

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.sampling import OWN, SamplingConfig, SourceConfig, open_sampling
from embodied.buffer.sample.windows import WindowSpec
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.episodes import Step
from embodied.learn.config import PARLConfig, RLPDConfig
from embodied.learn.parl import PARL
from embodied.learn.rlpd import RLPD

STATE = "observation.state"
SPEC = WindowSpec(1, 2, (STATE,))
ALONE = SamplingConfig()
ALGORITHMS = {"parl": (PARL, PARLConfig), "rlpd": (RLPD, RLPDConfig)}
DEMONSTRATED, ONLINE, ELSEWHERE = range(3)


def episode(kind, number=0, length=5):
    """Steps that show which kind of episode they are of."""
    return [
        Step(
            f"s{kind}",
            number,
            index,
            {STATE: np.full(3, kind, np.float32)},
            np.zeros(1, np.float32),
            truncated=index == length - 1,
            success=index == length - 1,
            intervention=kind != ONLINE,
            final=index == length,
        )
        for index in range(length + 1)
    ]


class Run:
    """A run's buffer, to which episodes come, and its sampler."""

    def __init__(self, path, algorithm, share, config):
        self.buffer = LocalBuffer(path)
        self.reader = ReplayReader(path)
        kind, options = ALGORITHMS[algorithm]
        sources = kind(options(demonstrations=share)).sources()
        assert list(sources) == [f"{OWN}.demonstrations", f"{OWN}.online"]
        self.sampling = open_sampling(config, self.reader, SPEC, sources, ReplayReader)
        self.rng = np.random.default_rng(0)

    def record(self, kind, number=0):
        for step in episode(kind, number):
            self.buffer.add(step)
        self.buffer.flush()
        self.reader.refresh()
        self.sampling.sampler.refresh()

    def drawn(self, rows):
        """How many rows of a batch came from each source; each shows its source's steps."""
        batch = self.sampling.sampler.sample(rows, self.rng)
        assert (batch[STATE][:, 0, 0] == batch["source"]).all()
        return np.bincount(batch["source"], minlength=3).tolist()

    def close(self):
        self.sampling.close()
        self.reader.close()
        self.buffer.close()


@pytest.fixture
def open_run(tmp_path):
    runs = []

    def go(algorithm, share=0.75, config=ALONE):
        runs.append(Run(tmp_path / "run", algorithm, share, config))
        return runs[-1]

    yield go
    for run in runs:
        run.close()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("first, only", [(DEMONSTRATED, [8, 0, 0]), (ONLINE, [0, 8, 0])])
def test_three_rows_of_four_are_demonstrations_once_there_are_both(
    open_run, algorithm, first, only
):
    run = open_run(algorithm)
    run.record(first)
    run.record(first, 1)
    assert [run.drawn(8) for _ in range(3)] == [only] * 3
    run.record(ONLINE if first == DEMONSTRATED else DEMONSTRATED)
    assert [run.drawn(8) for _ in range(3)] == [[6, 2, 0]] * 3
    found = np.cumsum([run.drawn(5)[DEMONSTRATED] for _ in range(20)])
    assert (np.abs(found - 0.75 * 5 * np.arange(1, 21)) < 1).all() and found[-1] == 75


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("share, counts", [(0.25, [2, 6, 0]), (0.5, [4, 4, 0])])
def test_the_share_is_that_of_the_options(open_run, algorithm, share, counts):
    run = open_run(algorithm, share)
    run.record(DEMONSTRATED)
    run.record(ONLINE)
    assert [run.drawn(8) for _ in range(3)] == [counts] * 3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_share_is_of_what_comes_from_the_run_not_from_other_sources(
    open_run, algorithm, tmp_path
):
    with LocalBuffer(tmp_path / "elsewhere") as buffer:
        for step in episode(ELSEWHERE):
            buffer.add(step)
    source = SourceConfig(path=str(tmp_path / "elsewhere"), ratio=1.0)
    run = open_run(algorithm, config=SamplingConfig(ratio=2.0, sources={"other": source}))
    run.record(DEMONSTRATED)
    run.record(ONLINE)
    assert [run.drawn(12) for _ in range(3)] == [[6, 2, 4]] * 3
