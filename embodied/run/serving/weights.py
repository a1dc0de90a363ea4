"""The policy that a server acts with, and newer weights for it."""

from pathlib import Path

from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.run import build
from embodied.run.renewal import Renewal
from embodied.weights.store import WeightStore, WeightWatcher
from embodied.weights.trial import Trial
from policies.acting import InferenceConfig
from policies.inference.policy import ActingPolicy


class Served:
    """A policy, warmed up for batches of so many rows. version: of its weights."""

    def __init__(
        self, checkpoint: Path, inference: InferenceConfig, *, rows: int, follow: bool
    ) -> None:
        """follow: take newer weights of the run as they are meant for all robots; ConfigError if
        checkpoint is no run directory."""
        self.policy: ActingPolicy
        self.policy, self.version, stored = build.acting_policy(checkpoint, inference, rows=rows)
        self._renewal: Renewal | None = None
        if not follow:
            return
        if stored is None:
            raise ConfigError(
                f"follow=true needs a run directory, and checkpoint={checkpoint} is a policy's "
                "folder: set follow=false"
            )
        store = WeightStore(RunDir(checkpoint).weights)
        self._renewal = Renewal(
            WeightWatcher(store, self.version, Trial(store).offered), self.policy
        )

    @property
    def fault(self) -> str:
        """Why the newest weights were passed over; "" if they were not."""
        return "" if self._renewal is None else self._renewal.fault

    def refresh(self) -> bool:
        """Act with the newest weights that are ready; whether there were newer ones.

        Errors as of Renewal.take.
        """
        manifest = None if self._renewal is None else self._renewal.take()
        if manifest is None:
            return False
        self.version = manifest.version
        return True

    def close(self) -> None:
        """Stop following, and end the policy's processes if it has any."""
        if self._renewal is not None:
            self._renewal.close()
        self.policy.close()
