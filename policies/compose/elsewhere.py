"""Members that compute in processes of their own. Shapes: B batch, H chunk, D action."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from embodied.core.protocols import Prediction
from policies.conversions import Scalar

T = TypeVar("T")


class Elsewhere(Protocol):
    """Such a member: it is asked, and what that returns waits for the answer."""

    def encode(self, obs: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
        """Its conditioning [B, C]; the observations are its own share."""
        ...

    def prepare(self, cond_BC: torch.Tensor, log_snrs: Sequence[float]) -> Any:
        """See GenerativePolicy; nothing is waited for."""
        ...

    def denoise(self, x_BHD: torch.Tensor, log_snr: Scalar, cond: Any) -> Callable[[], Prediction]:
        """See GenerativePolicy."""
        ...


def together(
    indices: Iterable[int],
    elsewhere: Mapping[int, Elsewhere],
    ask: Callable[[Elsewhere, int], Callable[[], T]],
    here: Callable[[int], T],
) -> dict[int, T]:
    """All members' answers: those elsewhere are asked, those here computed meanwhile."""
    chosen = tuple(indices)
    asked = {i: ask(elsewhere[i], i) for i in chosen if i in elsewhere}
    found = {i: here(i) for i in chosen if i not in asked}
    return {i: asked[i]() if i in asked else found[i] for i in chosen}
