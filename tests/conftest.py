"""Shared fixtures."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # as the links set it; read only once
os.environ["EMBODIED_STATE"] = tempfile.mkdtemp(prefix="embodied-test-")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import pytest
from opengl import needs_opengl  # noqa: F401 - before a simulator sets MUJOCO_GL
from point import PointDriver, RealPointDriver

if TYPE_CHECKING:
    from host import Host

_ALONE = (
    "conformance",
    "deploy/test_agent.py",
    "deploy/test_disturbed_host.py",
    "deploy/test_orphaned_servo.py",
    "deploy/test_remote_deployment.py",
    "deploy/test_restarted_servo.py",
    "deploy/test_services.py",
    "embodied/cli/test_calibrate.py",
    "embodied/cli/test_record.py",
    "embodied/cli/test_take_over.py",
    "embodied/run/test_async_run.py",
    "embodied/run/test_leased_run.py",
    "embodied/run/test_person_run.py",
    "hal/drivers",
    "hal/pool/test_holding.py",
    "hal/pool/test_pool_processes.py",
    "hal/safety/test_deadlines.py",
    "hal/teleop",
    "hal/test_cameras.py",
    "hal/test_device.py",
    "hal/test_gpus.py",
    "hal/test_listing.py",
    "hal/test_pictures.py",
    "hal/test_schedule.py",
    "sim/so101/test_lerobot_follower.py",
    "sim/so101/test_virtual_arm.py",
)

atexit.register(shutil.rmtree, os.environ["EMBODIED_STATE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the folders and files whose tests keep real time or use every core."""
    places = [Path(__file__).parent / name for name in _ALONE]
    for item in items:
        if any(item.path.is_relative_to(place) for place in places):
            item.add_marker("alone")


@pytest.fixture
def point_driver() -> PointDriver:
    return PointDriver()


@pytest.fixture
def real_point_driver() -> RealPointDriver:
    return RealPointDriver()


@pytest.fixture
def host(tmp_path, monkeypatch) -> Iterator["Host"]:
    """A robot host with a state directory of its own."""
    from host import Host

    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    made = Host(tmp_path)
    yield made
    made.close()
