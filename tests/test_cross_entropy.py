"""Cross entropy against float64: values and gradients over the full product of what can be asked for.

target kind x weight x ignore_index x label smoothing x reduction x shape x dtype x strides x strategy, then the options
that torch's function lacks, the statistics, dtypes that differ, and the signature.
"""

import inspect
import itertools
import warnings
from typing import NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softmax_ext
from softmax_ext import CrossEntropyStats, cross_entropy

# Class counts around the vectors of every ISA, and both layouts: few classes, class dimension in the middle.
SHAPES = [
    (7,),
    (1,),
    (5, 1),
    (4, 2),
    (3, 15),
    (3, 16),
    (3, 17),
    (131, 3),  # one more tile than fits, partly filled
    (2, 31),
    (2, 32),
    (2, 33),
    (3, 40),
    (2, 1000),
    (2, 5, 9),
    (2, 40, 3),
    (2, 3, 4, 5),
]
LARGE_SHAPES = [(2, 5000), (2, 50257), (1, 128256), (1, 5000, 3)]
KINDS = ["int64", "uint8", "probabilities"]
REDUCTIONS = ["none", "mean", "sum"]


class Strategy(NamedTuple):
    precompute_grad: bool
    inplace: bool
    scaled: bool  # an upstream gradient other than 1


STRATEGIES = [Strategy(*flags) for flags in itertools.product([False, True], repeat=3)]


def contiguous(values: Tensor) -> Tensor:
    return values.clone()


def transposed(values: Tensor) -> Tensor:
    """Classes outermost in memory."""
    dim = oracle.class_dim(values)
    return values.movedim(dim, 0).contiguous().movedim(0, dim)


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


LAYOUTS = [contiguous, transposed, sliced, stepped]


def run(input: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor, strategy: Strategy, **options):
    """(loss, gradient of the input, gradient of the target or None); ``input`` holds the gradient if it is inplace."""
    wants_target = target.is_floating_point() and not strategy.inplace
    target = target.detach().requires_grad_(wants_target)
    leaf = input.detach().requires_grad_()
    x = leaf.view_as(leaf)  # not a leaf, as a model's logits are not, but in the input's own memory
    loss = cross_entropy(
        x, target, weight, precompute_grad=strategy.precompute_grad, inplace=strategy.inplace, **options
    )
    result = loss.detach().clone()
    grads = torch.autograd.grad(loss, [leaf, target] if wants_target else [leaf], upstream.expand_as(loss))
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
    scale = oracle.gradient_scale(exact.grad, target, dim)
    grads = [oracle.tolerance("grad", exact.grad, dtype, scale=scale, roundings=n) for n in (1, 2)]
    grad_target = None
    if exact.grad_target is not None:
        scale = oracle.largest(exact.grad_target, dim)
        grad_target = oracle.tolerance("grad_target", exact.grad_target, dtype, scale=scale)
    return Bounds(exact, oracle.tolerance("loss", exact.loss, dtype), *grads, grad_target)


def check(bounds: Bounds, strategy: Strategy, results: tuple[Tensor, Tensor, Tensor | None], what: object) -> None:
    loss, grad, grad_target = results
    twice = strategy.precompute_grad and strategy.scaled
    oracle.assert_within(loss, bounds.exact.loss, bounds.loss, ("loss", what))
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
        rows = F.cross_entropy(values.double(), target if kind == "probabilities" else target.long(), reduction="none")
        size = rows.shape if options["reduction"] == "none" else ()
        scaled = (torch.rand(size, dtype=torch.float64) - 0.5).to(dtype).to(device)
        for upstream in (torch.ones((), dtype=dtype, device=device), scaled):
            bounds = bounds_for(values, target, weight, upstream, **options)
            for layout, strategy in itertools.product(layouts, strategies):
                if strategy.scaled != (upstream is scaled):
                    continue
                x = values if expanded else layout(values)
                results = run(x, target, weight, upstream, strategy, **options)
                check(bounds, strategy, results, (layout.__name__, strategy, weight is not None, options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_option_layout_and_strategy(shape, dtype, kind, device):
    check_product(shape, dtype, kind, device, LAYOUTS, STRATEGIES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_every_option_of_expanded_logits(shape, dtype, kind, device):
    def expanded(_):
        raise NotImplementedError

    strategies = [s for s in STRATEGIES if not s.inplace]
    check_product(shape, dtype, kind, device, [expanded], strategies, expanded=True)


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_many_classes(shape, dtype, kind, device):
    strategies = [Strategy(False, False, False), Strategy(True, False, True), Strategy(True, True, False)]
    check_product(shape, dtype, kind, device, [contiguous], strategies)
