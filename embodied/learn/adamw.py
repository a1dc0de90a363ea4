"""AdamW on named parameters, with its state as plain data."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.optim.adamw import adamw

from embodied.core.errors import CorruptDataError

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), by torch's fused kernel.

    torch.optim.AdamW gives the same numbers, but loads torch's compiler first, which takes longer
    than torch itself: a learner that died would be back that much later. A parameter has state
    once it has had a gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        self._parameters = dict(parameters)
        self._weight_decay = weight_decay
        self._betas = betas
        self._state: dict[str, dict[str, torch.Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every parameter that has a gradient."""
        found = {n: p for n, p in self._parameters.items() if p.grad is not None}
        states = [self._state_of(name) for name in found]
        adamw(
            list(found.values()),
            [p.grad for p in found.values() if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=learning_rate,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def _state_of(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self._state:
            parameter = self._parameters[name]
            moments = {key: torch.zeros_like(parameter) for key in _MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self._state[name] = {"step": step, **moments}
        return self._state[name]

    def arrays(self) -> dict[str, np.ndarray]:
        """Moments by "KEY/NAME", for the parameters that have any."""
        return {
            f"{key}/{name}": state[key].cpu().numpy()
            for name, state in self._state.items()
            for key in _MOMENTS
        }

    def steps(self) -> dict[str, float]:
        """How many steps each parameter has made that has made any."""
        return {name: float(state["step"]) for name, state in self._state.items()}

    def load(self, arrays: Mapping[str, np.ndarray], steps: Mapping[str, Any]) -> None:
        """Continue from what `arrays` and `steps` gave; KeyError for moments that are missing,
        CorruptDataError for those of other parameters."""
        for name, count in steps.items():
            if name not in self._parameters:
                continue
            state = self._state_of(name)
            state["step"].fill_(count)
            for key in _MOMENTS:
                moments = torch.from_numpy(arrays[f"{key}/{name}"])
                if moments.shape != state[key].shape:
                    raise CorruptDataError(
                        f"{key} of {name} has shape {tuple(moments.shape)}; "
                        f"{tuple(state[key].shape)} is right"
                    )
                state[key].copy_(moments)
