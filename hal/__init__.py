"""Robots as devices: enumerated, given a stream of chunks, watched and reset."""

from hal.device import Device
from hal.discovery import DeviceRow, devices
from hal.group import DeviceGroup, make_group
from hal.health import DeviceInfo, Health

__all__ = ["Device", "DeviceGroup", "DeviceInfo", "DeviceRow", "Health", "devices", "make_group"]
