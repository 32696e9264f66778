"""The dtypes of a call: of the kernels' arithmetic, of the operands under torch.autocast, and of the loss."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of the statistics and of the arithmetic on a logit: float64 if one of ``dtypes`` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def autocasts(tensor: Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device. For meta tensors there is no autocast."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(tensor: Tensor) -> Tensor:
    """Casts an operand of a linear layer as torch.autocast does."""
    if tensor.dtype == torch.float64 or not autocasts(tensor):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def default_loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype | None:
    """The dtype of the loss, or None if it is the input's.

    Probabilities and their class weights promote the input's dtype. Under autocast half types become float32.
    """
    own = input.dtype
    if target.dtype.is_floating_point:
        for other in (target, weight):
            own = own if other is None else torch.promote_types(own, other.dtype)
    if own.itemsize == 2 and autocasts(input):
        return torch.float32  # autocast computes cross entropy in float32
    return None if own == input.dtype else own
