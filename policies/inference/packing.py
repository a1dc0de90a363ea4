"""Convolutions whose weights are laid out once. Shapes: B batch, N channels, L length."""

from typing import Any

import torch
from torch import nn

PACKED_FROM = 1 << 15
"""Weights from which packing pays: for fewer the operator costs more (0.03 ms) than it saves."""


class PackedConv1d(nn.Module):
    """A Conv1d or ConvTranspose1d whose weights lie as oneDNN's kernels read them.

    PyTorch brings the weights of a convolution into that layout in each call, which at batch 1
    takes several times as long as the convolution itself. For inference on a CPU: no gradient.
    """

    def __init__(self, conv: nn.Conv1d | nn.ConvTranspose1d) -> None:
        """Takes the weights as they are now: later changes of `conv` have no influence."""
        super().__init__()
        mkldnn: Any = torch.ops.mkldnn
        # A height of 1 makes it the 2-D convolution that oneDNN knows.
        padding, stride = [0, *_numbers(conv.padding)], [1, *conv.stride]
        dilation, shape = [1, *conv.dilation], [1, conv.in_channels, 1, 16]
        if isinstance(conv, nn.ConvTranspose1d):
            self._geometry: Any = (
                padding,
                [0, *conv.output_padding],
                stride,
                dilation,
                conv.groups,
            )
            reorder = mkldnn._reorder_convolution_transpose_weight
            self._operator = mkldnn._convolution_transpose_pointwise
        else:
            self._geometry = (padding, stride, dilation, conv.groups)
            reorder = mkldnn._reorder_convolution_weight
            self._operator = mkldnn._convolution_pointwise
        self._bias = conv.bias
        weight = conv.weight.detach()[:, :, None].contiguous()
        self._weight = reorder(weight, *self._geometry, shape)

    def forward(self, x_BNL: torch.Tensor) -> torch.Tensor:
        """[B, n_in, L] → [B, n_out, L′]."""
        x_BN1L = x_BNL[:, :, None]
        out_BN1L = self._operator(x_BN1L, self._weight, self._bias, *self._geometry, "none", [], "")
        return out_BN1L[:, :, 0]


def packable(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has oneDNN, with kernels of this type for this CPU."""
    mkldnn: Any = torch.ops.mkldnn
    built = torch.backends.mkldnn.is_available() and hasattr(mkldnn, "_reorder_convolution_weight")
    return built and (dtype != torch.bfloat16 or mkldnn._is_mkldnn_bf16_supported())


def pack(module: nn.Module) -> None:
    """Put packed ones in the place of the module's larger convolutions."""
    for name, child in module.named_children():
        plain = isinstance(child, nn.Conv1d | nn.ConvTranspose1d)
        if plain and child.weight.numel() >= PACKED_FROM and child.padding_mode == "zeros":
            setattr(module, name, PackedConv1d(child))
        else:
            pack(child)


def _numbers(padding: Any) -> tuple[int, ...]:
    assert not isinstance(padding, str), "networks give their padding in numbers"
    return padding
