"""What a policy asks of a member that computes in a process of its own (process.py, worker.py).

Every request but Condition is answered: by Done, Encoded, Predicted or ErrorReply.
"""

from typing import Any

import msgspec

from embodied.comms.channels import ErrorReply
from embodied.core.protocols import Parameterisation
from policies.acting import InferenceConfig


class Build(msgspec.Struct, frozen=True, tag="build", forbid_unknown_fields=True):
    """Make the member. policy: its configuration as in a checkpoint."""

    policy: dict[str, Any]
    inference: InferenceConfig


class Weights(msgspec.Struct, frozen=True, tag="weights", forbid_unknown_fields=True):
    """Some of its arrays, by name."""


class Load(msgspec.Struct, frozen=True, tag="load", forbid_unknown_fields=True):
    """Act with the weights that have come, which are all there are."""


class Encode(msgspec.Struct, frozen=True, tag="encode", forbid_unknown_fields=True):
    """Its own share of the observations, by key: [B, To, …]."""


class Condition(msgspec.Struct, frozen=True, tag="condition", forbid_unknown_fields=True):
    """ "cond" [B, C] of the predictions to come. log_snrs: levels to prepare for; may be none."""

    log_snrs: tuple[float, ...]


class Predict(msgspec.Struct, frozen=True, tag="predict", forbid_unknown_fields=True):
    """The prediction at "x" [B, H, D]. log_snr: None if it is an array, [B]."""

    log_snr: float | None


class Done(msgspec.Struct, frozen=True, tag="done", forbid_unknown_fields=True):
    """It is done."""


class Encoded(msgspec.Struct, frozen=True, tag="encoded", forbid_unknown_fields=True):
    """ "cond" [B, C]."""


class Predicted(msgspec.Struct, frozen=True, tag="predicted", forbid_unknown_fields=True):
    """ "value" [B, H, D]."""

    parameterisation: Parameterisation


REQUESTS = (Build, Weights, Load, Encode, Condition, Predict)
REPLIES = (Done, Encoded, Predicted, ErrorReply)
