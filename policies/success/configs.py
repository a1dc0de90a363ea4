"""Options and file of a success classifier; reading them does not load torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, CorruptDataError, SpecError
from embodied.core.files import read_tensors, write_tensors
from embodied.core.specs import ArraySpec, PolicySpec
from policies.configs import Count, ImagesConfig

FILE = "classifier.safetensors"
FORMAT = 1
MAX_ELEMENTS = 1 << 22


class SuccessConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the network.

    n_obs_steps: how many observations, up to the judged one, it sees. width, depth: units and
    number of hidden layers. observation_normalization, images: see ChunkConfig.
    """

    n_obs_steps: Count = 1
    width: Annotated[int, msgspec.Meta(ge=8, le=8192)] = 64
    depth: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    observation_normalization: Literal["limits", "gaussian"] = "gaussian"
    images: ImagesConfig = msgspec.field(default_factory=ImagesConfig)


class StoredClassifier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the file says beside the weights.

    spec: the recording that it learned from, with the observations that it reads; its chunks mean
    nothing. threshold: of the probability, from which an observation counts as success. patience:
    observations in a row that must, for an episode to succeed. positives: last observations of a
    successful episode that were labelled as success.
    """

    format: int
    spec: PolicySpec
    options: SuccessConfig
    threshold: Annotated[float, msgspec.Meta(gt=0, le=1)]
    patience: Annotated[int, msgspec.Meta(ge=1)]
    positives: Annotated[int, msgspec.Meta(ge=1)]

    def check(self, observation: Mapping[str, ArraySpec], action: ArraySpec, where: str) -> None:
        """SpecError unless `where` observes what the classifier reads, on such a robot."""
        for key, wanted in self.spec.observation.items():
            found = observation.get(key)
            if found is None:
                raise SpecError(
                    f"the success classifier reads '{key}', which {where} does not have; it has "
                    f"{', '.join(observation)}"
                )
            _compare(key, found, wanted, where)
        _compare("action", action, self.spec.action, where)


def _compare(key: str, found: ArraySpec, wanted: ArraySpec, where: str) -> None:
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        raise SpecError(
            f"{where} has {key} as {found.dtype} {found.shape}; the success classifier learned "
            f"from {wanted.dtype} {wanted.shape}"
        )


def write_classifier(
    directory: Path, header: StoredClassifier, arrays: Mapping[str, np.ndarray]
) -> None:
    """Write FILE into a directory, which is made if need be; it appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / FILE, arrays, msgspec.json.encode(header))


def read_classifier(directory: Path) -> tuple[StoredClassifier, dict[str, np.ndarray]]:
    """What `write_classifier` wrote; ConfigError if there is none, CorruptDataError for one that is
    damaged or of another format."""
    path = directory / FILE
    if not path.is_file():
        raise ConfigError(
            f"{directory} holds no {FILE}: give the output of `embodied reward train`"
        )
    arrays, data = read_tensors(path)
    try:
        return decode_header(data), arrays
    except CorruptDataError as error:
        raise CorruptDataError(f"{path}: {error}") from error


def decode_header(data: bytes) -> StoredClassifier:
    """The header of a classifier's file; CorruptDataError for one of another format or size."""
    try:
        header = msgspec.json.decode(data, type=StoredClassifier)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptDataError(f"its header cannot be read: {error}") from error
    if header.format != FORMAT:
        raise CorruptDataError(f"its format is {header.format}; {FORMAT} is right")
    sizes = [array.size * header.spec.n_obs_steps for array in header.spec.observation.values()]
    if max(sizes, default=0) > MAX_ELEMENTS:
        raise CorruptDataError(f"it reads {max(sizes)} numbers at a time; that is too many")
    return header
