"""A learned success classifier as a reward."""

import importlib
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from embodied.core.frames import Frame
from embodied.core.protocols import Operator
from embodied.core.specs import DeviceSpec
from policies.success.configs import read_classifier


class ClassifierReward:
    """Success when the classifier has said so of `patience` observations in a row.

    It computes in the process that acts or records, one observation a tick. Being made, as for the
    check of a configuration, it does not load torch.
    """

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """path: output of `embodied reward train`. threshold, patience: None for its own."""

        path: str
        threshold: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
        patience: Annotated[int, msgspec.Meta(ge=1)] | None = None

    @staticmethod
    def prepare() -> None:
        """Load torch."""
        importlib.import_module("policies.success.classifier")

    def __init__(self, config: Config, spec: DeviceSpec, operator: Operator | None) -> None:
        """ConfigError or CorruptDataError without a whole classifier at the path, SpecError if the
        device senses other things than it reads."""
        self._header, self._arrays = read_classifier(Path(config.path))
        self._header.check(spec.observation, spec.action, "this device")
        self._threshold = config.threshold or self._header.threshold
        self._patience = config.patience or self._header.patience
        self._frames: deque[Frame] = deque(maxlen=self._header.spec.n_obs_steps)
        self._classifier: Any = None
        self._count = 0

    def begin(self, frame: Frame) -> None:
        """Forget the episode before; load the network the first time."""
        self._frames.clear()
        self._frames.append(frame)
        self._count = 0
        if self._classifier is None:
            from policies.success.classifier import restore_classifier

            self._classifier = restore_classifier(self._header, self._arrays)

    def __call__(self, frame: Frame) -> bool | None:
        """See ClassifierReward."""
        self._frames.append(frame)
        probability = self._classifier.probabilities(self._observed())[0]
        self._count = self._count + 1 if probability >= self._threshold else 0
        return True if self._count >= self._patience else None

    def _observed(self) -> dict[str, np.ndarray]:
        """The last observations, the episode's first standing in for those before it: [1, T, …]."""
        steps = self._header.spec.n_obs_steps
        frames = [self._frames[0]] * (steps - len(self._frames)) + list(self._frames)
        return {
            key: np.stack([frame.observation[key] for frame in frames])[None]
            for key in self._header.spec.observation
        }
