"""Cross entropy held against the oracle: with every option, in every layout and by every strategy.

A strategy is where the gradient is computed and written, and whether it is scaled afterwards.
"""

import itertools
from typing import NamedTuple

import oracle
import torch
from layouts import contiguous, sliced, stepped, transposed
from torch import Tensor

from softmax_ext import cross_entropy

KINDS = ["int64", "uint8", "probabilities"]
REDUCTIONS = ["none", "mean", "sum"]


class Strategy(NamedTuple):
    precompute_grad: bool
    inplace: bool
    scaled: bool  # an upstream gradient other than 1


LAYOUTS = [contiguous, transposed, sliced, stepped]


def run(input: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor, strategy: Strategy, **options):
    """(loss, gradient of the input, gradient of the target or None); ``input`` holds the gradient if it is inplace."""
    # With a gradient wanted for the target too, precompute_grad has no effect.
    wants_target = target.is_floating_point() and not strategy.inplace and not strategy.precompute_grad
    target = target.detach().requires_grad_(wants_target)
    x = oracle.as_computed(input) if strategy.inplace else input.detach().requires_grad_()
    edge = torch.autograd.graph.get_gradient_edge(x)  # before x becomes the result of what overwrites it
    loss = cross_entropy(
        x, target, weight, precompute_grad=strategy.precompute_grad, inplace=strategy.inplace, **options
    )
    result = loss.detach().clone()
    grads = torch.autograd.grad(loss, [edge, target] if wants_target else [edge], upstream.expand_as(loss))
    if strategy.inplace:
        assert grads[0].data_ptr() == input.data_ptr(), "inplace=True has put the gradient elsewhere"
    return result, grads[0], grads[1] if wants_target else None


class Bounds(NamedTuple):
    """What is right and how far off it may be, for one set of values and options."""

    exact: oracle.Exact
    loss: Tensor
    grad: Tensor
    grad_twice_rounded: Tensor  # a precomputed gradient that is scaled afterwards
    grad_target: Tensor | None


def bounds_for(input: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor, **options) -> Bounds:
    exact = oracle.cross_entropy(input, target, weight, upstream=upstream, **options)
    dim, dtype = oracle.class_dim(input), input.dtype
    rounded_z = oracle.conditioning(input, **options)
    row_weight = options.get("row_weight")
    if row_weight is not None:
        x, y = oracle.double(input), oracle.double(target)
        transformation = {k: v for k, v in options.items() if k in ("ignore_index", "softcap", "logit_scale")}
        factors = oracle.row_factors(x, y, row_weight, **transformation)
        by_probability = isinstance(row_weight, str)
        if by_probability:  # an error of nll is one of its exponential
            rounded_z = rounded_z * (1 - factors.log().clamp(min=-100))
        options |= {"factors": factors, "total_factors": 1 if by_probability else factors}
    scale = oracle.gradient_scale(exact.grad, target, weight, upstream=upstream, **options) * rounded_z.unsqueeze(dim)
    grads = [oracle.tolerance("grad", exact.grad, dtype, scale=scale, roundings=n) for n in (1, 2)]
    grad_target = None
    if exact.grad_target is not None:
        scale = oracle.largest(exact.grad_target, dim) * rounded_z.unsqueeze(dim)
        grad_target = oracle.tolerance("grad_target", exact.grad_target, dtype, scale=scale)
    scale = exact.loss * (rounded_z if exact.loss.dim() else rounded_z.max())
    return Bounds(exact, oracle.tolerance("loss", exact.loss, dtype, scale=scale), *grads, grad_target)


def check(bounds: Bounds, strategy: Strategy, results: tuple[Tensor, Tensor, Tensor | None], what: object) -> None:
    loss, grad, grad_target = results
    oracle.assert_within(loss, bounds.exact.loss, bounds.loss, ("loss", what))
    twice = oracle.gradient_roundings(grad.dtype, strategy.precompute_grad, strategy.scaled) == 2
    allowed = bounds.grad_twice_rounded if twice else bounds.grad
    oracle.assert_within(grad, bounds.exact.grad, allowed, ("gradient", what))
    if grad_target is not None:
        oracle.assert_within(grad_target, bounds.exact.grad_target, bounds.grad_target, ("target's gradient", what))


def each_option(kind: str, classes: int, dtype: torch.dtype, first_target: int):
    """Every (weight, options) that torch's function can be asked for."""
    ignores = [-100] if kind == "probabilities" else [-100, first_target]
    weights = [None, oracle.make_weight(classes, dtype)]
    for weight, ignore, smoothing, reduction in itertools.product(weights, ignores, [0.0, 0.1], REDUCTIONS):
        yield weight, {"ignore_index": ignore, "label_smoothing": smoothing, "reduction": reduction}


def check_product(shape, dtype, kind, device, layouts, strategies, expanded=False):
    """Every option, layout and strategy on one set of values."""
    dim = 0 if len(shape) == 1 else 1
    values = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)
    if expanded:
        values = values[:1].expand(shape)
    target = oracle.make_target(kind, shape, dtype).to(device)
    first = 0 if kind == "probabilities" else int(target.reshape(-1)[0])
    for weight, options in each_option(kind, shape[dim], dtype, first):
        weight = None if weight is None else weight.to(device)
        size = (*shape[:dim], *shape[dim + 1 :]) if options["reduction"] == "none" else ()
        scaled = (torch.rand(size, dtype=torch.float64) - 0.5).to(dtype).to(device)
        for upstream in (torch.ones((), dtype=dtype, device=device), scaled):
            bounds = bounds_for(values, target, weight, upstream, **options)
            for layout, strategy in itertools.product(layouts, strategies):
                if strategy.scaled != (upstream is scaled):
                    continue
                x = values if expanded else layout(values)
                results = run(x, target, weight, upstream, strategy, **options)
                check(bounds, strategy, results, (layout.__name__, strategy, weight is not None, options))
