"""The range of float16 in a linear cross entropy: what the logits' gradients are divided by while they are in float16.

They are factors of the products, and have 5 bits of exponent. Weights and upstream gradients of any size must leave
them within that range. So all are divided by one power of two, and the products, which are float32, are multiplied by
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Operands
from .options import Options
from .reference import Upstream, class_index, is_live

# What the largest gradient of a logit becomes, in powers of two: halfway to the largest number, for logit_scale and
# z_loss may enlarge it.
_LARGEST = 8


def _row_factors(operands: Operands, options: Options) -> Tensor:
    """How large the gradient of a logit can be for an upstream gradient of 1, [N, *K] float64; 0 for ignored rows."""
    target, weight = operands.target, operands.weight
    factors = operands.input.new_ones(operands.loss_shape, dtype=torch.float64)
    weights = weight.detach().double().abs() if weight is not None and weight.numel() else None
    if target.is_floating_point():
        if weights is not None:
            factors = factors * weights.max()
    else:
        live = is_live(target, options.ignore_index)
        if weights is not None:
            factors = weights[class_index(target, live, weights.numel())] + options.label_smoothing * weights.mean()
        factors = torch.where(live, factors, 0.0)
    if operands.row_weight is not None:
        factors = torch.where(factors == 0, 0.0, factors * operands.row_weight.double().abs())
    return factors


def _power(bounds: Tensor) -> Tensor:
    """The power of two, [] float32, by which the largest bound becomes about 2^_LARGEST; 1 if all are 0, or none is."""
    none = bounds.new_zeros(1)
    most = torch.cat([bounds.nan_to_num(0, 0, 0).flatten(), none]).max()
    exponent = (torch.frexp(most).exponent - _LARGEST).clamp(-120, 120)
    return torch.where(most > 0, torch.ldexp(torch.ones_like(most), exponent), 1.0).float()


def divisor_of_forward(operands: Operands, options: Options) -> Tensor | None:
    """That of the gradients which forward computes, for an upstream gradient of 1; None: 1."""
    if operands.input.dtype != torch.float16 or options.weighs_by_probability:
        return None
    if operands.weight is None and operands.row_weight is None:
        return None
    return _power(_row_factors(operands, options))


def divided_by(operands: Operands, divisor: Tensor) -> Operands:
    """The operands whose losses, and their gradients, are divided by ``divisor``."""
    row_weight = operands.row_weight
    if row_weight is None:
        row_weight = operands.input.new_ones(operands.loss_shape, dtype=torch.float32)
    return operands._replace(row_weight=row_weight / divisor)


def divisor_of_backward(operands: Operands, options: Options, upstream: Upstream, needs_target: bool) -> Tensor | None:
    """That of the upstream gradients [N, *K] of a backward; None: 1.

    With a gradient of the target too, which is no product and would be rounded twice, they are not divided.
    """
    if operands.input.dtype != torch.float16 or needs_target:
        return None
    loss, *statistics = upstream
    bounds = operands.input.new_zeros(operands.loss_shape, dtype=torch.float64)
    if loss is not None:
        bounds = bounds + (loss.double().abs() * _row_factors(operands, options)).nan_to_num(0, 0, 0)
    for gradient in statistics:
        if gradient is not None:
            bounds = bounds + gradient.double().abs().nan_to_num(0, 0, 0)
    return _power(bounds)
