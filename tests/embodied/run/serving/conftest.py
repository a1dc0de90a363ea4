from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from served import ServerProcess


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start(tmp_path) -> Iterator:
    """Starts policy servers that end with the test."""
    with ExitStack() as stack:

        def started(checkpoint, **options):
            server = ServerProcess(tmp_path, checkpoint, **options)
            stack.callback(server.close)
            return server

        yield started
