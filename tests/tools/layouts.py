"""The same values otherwise laid out in memory, always in a copy."""

import torch
from torch import Tensor


def contiguous(values: Tensor) -> Tensor:
    return values.clone()


def transposed(values: Tensor) -> Tensor:
    """The classes, dimension 1 or of a single row 0, outermost in memory."""
    dim = min(values.dim() - 1, 1)
    return values.movedim(dim, 0).clone(memory_format=torch.contiguous_format).movedim(0, dim)


def reversed_dims(values: Tensor) -> Tensor:
    """The first dimension is the innermost in memory."""
    order = tuple(reversed(range(values.dim())))
    return values.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


def sliced(values: Tensor) -> Tensor:
    """A window of a wider tensor: rows neither dense nor aligned."""
    wide = values.new_zeros(*values.shape[:-1], values.shape[-1] + 3)
    window = wide[..., 1 : 1 + values.shape[-1]]
    window.copy_(values)
    return window


def stepped(values: Tensor) -> Tensor:
    """Every second element of the last dimension."""
    wide = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1] + 1)
    window = wide[..., 1::2]
    window.copy_(values)
    return window
