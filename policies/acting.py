"""Options of acting; apart from it, so that reading them does not load torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from embodied.comms.sockets import check_address
from embodied.core.errors import ConfigError

if TYPE_CHECKING:
    from policies.solvers.base import Solver


class RtcConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a chunk follows the committed actions (policies/guidance.py).

    mode: "identity" takes ∂Â¹/∂A for 1 (no gradient; steadier in practice), "full" asks the
    network for it (a backward pass in each step), "copy" writes the committed actions over the
    head of the chunk and guides nothing. beta: the greatest weight w. schedule: how W falls behind
    the committed actions over the rest of the chunk before, where that is known.
    """

    mode: Literal["identity", "full", "copy"] = "identity"
    beta: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    schedule: Literal["exponential", "linear", "hard"] = "exponential"


class WarmStartConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the solver begins, given the chunk before: one of the two.

    fraction: share of the steps that are left out. log_snr: it begins at the first level that is
    at least this. The lower, the further the new chunk can be from the one before.
    """

    fraction: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None
    log_snr: float | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError unless exactly one is given."""
        if (self.fraction is None) == (self.log_snr is None):
            raise ConfigError("warm_start needs either fraction or log_snr")

    def step(self, solver: Solver) -> int:
        """The step that the solver begins with; at least the last one is always taken."""
        levels = solver.log_snrs
        if self.fraction is not None:
            return min(round(self.fraction * len(levels)), len(levels) - 1)
        assert self.log_snr is not None
        reached = [k for k, level in enumerate(levels) if level >= self.log_snr]
        return min(reached, default=len(levels) - 1)


class InferenceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a policy computes while it acts.

    device: where. threads: of the CPU, in each process that acts. dtype: of the network's work
    between its inputs and its output; bfloat16 halves what the CPU must read. packed: weights of
    convolutions laid out for the CPU's kernels once; None wherever that works. compile: by
    torch.compile, which takes from seconds to a minute before the first decision. parallel: a
    composition's members at the same time, all but the first in processes of their own; where
    gradients are needed, one after the other. cuda_graphs: with compile on a GPU, replay the
    kernels without Python. warm_up: decide a few times on zeros before the first decision that
    counts.
    remote: address of a policy server (embodied serve) that decides in the place of a policy here.
    fallback: where it does not answer in time, the policy here decides. patience_s: without any
    decision for so long, it is an error.
    critic: whether an improved policy acts with its critic; else as the policy in it, which needs
    none of what the critic alone reads.
    num_steps: solver steps to choose from on robots whose time does not wait, the most that fit
    the control period; empty for the policy's own. rtc, warm_start: None for the policy's own.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    packed: bool | None = None
    compile: bool = False
    parallel: bool = False
    cuda_graphs: bool = False
    warm_up: bool = True
    critic: bool = True
    num_steps: tuple[int, ...] = ()
    rtc: RtcConfig | None = None
    warm_start: WarmStartConfig | None = None
    remote: str | None = None
    fallback: bool = False
    patience_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0

    def __post_init__(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        if self.fallback and self.remote is None:
            raise ConfigError("inference.fallback is for inference.remote: name a policy server")
        if self.remote is not None:
            check_address(self.remote)
        if self.cuda_graphs and not (self.compile and self.device == "cuda"):
            raise ConfigError("inference.cuda_graphs needs inference.compile and device=cuda")
        if self.parallel and self.device != "cpu":
            raise ConfigError(
                "inference.parallel is for device=cpu: on one GPU, processes take turns"
            )
        if self.packed and (self.compile or self.device != "cpu"):
            raise ConfigError(
                "inference.packed is for device=cpu without compile; leave it null to have it there"
            )
        if self.packed and self.rtc is not None and self.rtc.mode == "full":
            raise ConfigError("inference.rtc.mode=full needs gradients, which packed weights lack")
