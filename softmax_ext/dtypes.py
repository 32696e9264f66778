"""Which dtype a call computes in: what torch.autocast says, what is promoted, what the kernels add up in."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Of the arithmetic on each logit, and of the statistics: float64 if any operand or the result is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def autocasts(tensor: Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device; meta tensors have none."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(tensor: Tensor) -> Tensor:
    """As torch.autocast casts the operands of a linear layer."""
    if tensor.dtype == torch.float64 or not autocasts(tensor):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def default_loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype | None:
    """The dtype of the loss where it is not the input's: promoted with probabilities, or autocast's."""
    own = input.dtype
    if target.dtype.is_floating_point:
        for other in (target, weight):
            own = own if other is None else torch.promote_types(own, other.dtype)
    if own.itemsize == 2 and autocasts(input):
        return torch.float32  # cross entropy is on autocast's float32 list
    return None if own == input.dtype else own
