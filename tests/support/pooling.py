"""Devices for a pool, and a clock for it that a test moves."""

from hal.pool.pool import DeviceRecord

S = 1_000_000_000


class FakeClock:
    def __init__(self, now_s=100.0, boot_id="boot-0"):
        self.ns = round(now_s * S)
        self.boot_id = boot_id

    def now_ns(self):
        return self.ns

    def sleep_until(self, t_ns):
        self.ns = max(self.ns, t_ns)

    def tick(self, seconds):
        self.ns += round(seconds * S)


def arm(id, *capabilities, **fields):
    return DeviceRecord(id, "so101", ("robot", "arm"), "bench", capabilities, **fields)


def beat(pool, *ids, health="ready"):
    return [pool.update(id, health) for id in ids]


def ids(allocation):
    return [device.id for device in allocation.devices]
