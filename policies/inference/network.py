"""A network as it acts. Shapes: B batch, H chunk, D action, C conditioning."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from embodied.core.errors import ConfigError
from policies.acting import InferenceConfig
from policies.inference.packing import PackedConv1d, pack, packable
from policies.lora.merge import merge_adapters
from policies.networks.stages import Context, Staged


class ActingNetwork(nn.Module):
    """A network whose second stage is packed, of lower precision or compiled, and whose low-rank
    updates are folded in unless it is compiled.

    The first stage stays float32 and the source's own: bfloat16 does not tell neighbouring times
    apart. It holds the source's weights as they were at the last `refresh`.
    """

    def __init__(self, source: nn.Module, config: InferenceConfig, *, gradients: bool) -> None:
        """gradients: whether they will be asked for with respect to the noisy chunk.

        ConfigError for a reduced precision that the network cannot have, or packed weights that
        this machine cannot.
        """
        super().__init__()
        if config.dtype != "float32" and not isinstance(source, Staged):
            raise ConfigError(
                f"inference.dtype={config.dtype} needs a network in two stages, since times are "
                f"embedded in float32; {type(source).__name__} has one (networks/stages.py)"
            )
        self._source = source
        self._dtype = getattr(torch, config.dtype)
        able = packable(self._dtype)
        if config.packed and not able:
            raise ConfigError(
                f"inference.packed=true needs kernels of oneDNN for {config.dtype}, which PyTorch "
                "or the CPU lacks here; leave it null to have them where they are"
            )
        possible = config.device == "cpu" and able and not config.compile and not gradients
        self._packed = possible if config.packed is None else config.packed
        self._compile = config.compile
        self._options: Any = {"triton.cudagraphs": True} if config.cuda_graphs else None
        self._make()

    def refresh(self) -> None:
        """Take the source's weights as they are now."""
        if self._packed or self._merged:
            self._make()
            return
        with torch.no_grad():
            for own, new in zip(self._body.parameters(), self._source.parameters(), strict=True):
                own.copy_(new)

    def _make(self) -> None:
        self._body = copy.deepcopy(self._source).requires_grad_(False)
        self._merged = not self._compile and merge_adapters(self._body)
        self._body = self._body.to(self._dtype).eval()
        if self._packed:
            pack(self._body)
            self._packed = any(isinstance(m, PackedConv1d) for m in self._body.modules())
        self._run: Callable[..., torch.Tensor] = (
            self._body.refine if isinstance(self._body, Staged) else self._body.forward
        )
        if self._compile:
            self._run = torch.compile(self._run, dynamic=False, options=self._options)

    def forward(
        self, x_BHD: torch.Tensor, time_B: torch.Tensor, cond_BC: torch.Tensor
    ) -> torch.Tensor:
        """See the networks."""
        return self.refine(x_BHD, self.prepare(time_B, cond_BC))

    def prepare(self, time_B: torch.Tensor, cond_BC: torch.Tensor) -> Context:
        """See Staged."""
        context: Context = time_B, cond_BC
        if isinstance(self._source, Staged):
            context = self._source.prepare(time_B, cond_BC)
        return tuple(part.to(self._dtype) for part in context)

    def refine(self, x_BHD: torch.Tensor, context: Context) -> torch.Tensor:
        """See Staged."""
        x_BHD = x_BHD.to(self._dtype)
        if isinstance(self._source, Staged):
            return self._run(x_BHD, context)
        return self._run(x_BHD, *context)
