"""Nobody: a policy is alone with the robot."""

import msgspec
import numpy as np

from embodied.core.frames import Observation
from embodied.core.protocols import Event


class Nobody:
    """A teleoperator that never takes part."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """It has no options."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def open(self) -> None:
        """Nothing to connect."""

    def read(self, observation: Observation) -> np.ndarray | None:
        """None, always."""
        return None

    def events(self) -> list[Event]:
        """Nothing is signalled."""
        return []

    def close(self) -> None:
        """Nothing to disconnect."""
