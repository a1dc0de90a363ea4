"""Failed reads that are bridged: what they said is told."""

from follower import Follower

from hal.device import Device
from hal.health import DeviceInfo, Health, Monitor
from hal.safety.config import SafetyConfig


def test_the_error_of_a_bridged_read_is_the_reason_for_the_devices_state():
    driver = Follower()
    device = Device(
        driver, info=DeviceInfo("arm", "test", "here"), safety=SafetyConfig(heartbeat_s=None)
    )
    with device:
        device.advance(2)
        assert device.info.reason == ""
        driver.unreadable = 2
        device.advance(5)
        assert device.info.health is Health.DEGRADED
        assert device.info.reason == "2 failed reads lately (OSError: no answer)"


def test_the_last_reason_counts_and_passes_with_the_events():
    monitor = Monitor(degraded_s=0.0)
    monitor.opened = True
    monitor.count("failed reads", degrades=True, why="OSError: no answer")
    assert monitor.state() == (Health.READY, "")
    monitor = Monitor()
    monitor.opened = True
    monitor.count("failed reads", degrades=True, why="OSError: no answer")
    monitor.count("failed reads", degrades=True, why="elbow: damaged bytes")
    monitor.count("overruns", degrades=True)
    reason = "2 failed reads lately (elbow: damaged bytes), 1 overruns lately"
    assert monitor.state() == (Health.DEGRADED, reason)
