"""Low-rank layers, folded into the layers that they adapt."""

from torch import nn


def merge_adapters(module: nn.Module) -> bool:
    """Put W + alpha / rank B A in the place of W in every adapted layer; whether there were any."""
    found = False
    for name, child in list(module.named_children()):
        if isinstance(getattr(child, "lora_A", None), nn.ModuleDict):
            adapted: nn.Module = child
            adapted.merge()  # pyright: ignore[reportCallIssue]
            setattr(module, name, adapted.get_base_layer())  # pyright: ignore[reportCallIssue]
            found = True
        else:
            found |= merge_adapters(child)
    return found
