import multiprocessing

import pytest
import torch

from embodied.learn.snapshot import Snapshot, publishes


def test_a_snapshot_holds_what_the_tensors_were():
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7)}
    arrays = Snapshot(tensors, None).arrays()
    assert arrays["w"].tolist() == [[0, 1, 2], [3, 4, 5]] and arrays["n"] == 7


@pytest.mark.gpu
def test_a_gpu_goes_on_while_its_weights_are_copied():
    stream = torch.cuda.Stream()
    weights = torch.zeros(1 << 24, device="cuda")
    snapshots = []
    for step in range(20):
        weights += 1
        snapshots.append((step + 1, Snapshot({"w": weights.clone()}, stream)))
        weights.mul_(1.0)
    for value, snapshot in snapshots:
        array = snapshot.arrays()["w"]
        assert array.min() == array.max() == value


def join(rank, path):
    store = torch.distributed.FileStore(path, 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    assert publishes() == (rank == 0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_one_process_of_a_group_publishes(tmp_path):
    assert publishes()
    context = multiprocessing.get_context("fork")  # another import of torch takes seconds
    children = [context.Process(target=join, args=(rank, str(tmp_path / "g"))) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
