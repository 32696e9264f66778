"""The same bits: run after run, for any number of threads, wherever a row stands in its batch and in memory.

Each dtype and layout for 1, 2, 3 and 7 threads; a hundred runs, in-place gradients, and places within a vector; and
linear cross entropy, whose matrix products are torch's: docs/trust.md says what of that is promised.
stress/test_large_results.py has what is stored past the caches.
"""

import itertools
from collections.abc import Sequence

import oracle
import pytest
import torch
from torch import Tensor

import softmax_ext
from softmax_ext import cross_entropy, linear_cross_entropy

RUNS = {1: 5, 2: 5, 7: 100}  # with so many threads
FUNCTIONS = [softmax_ext.softmax, softmax_ext.log_softmax]
WAYS = [{}, {"precompute_grad": True, "inplace": True}, {"return_stats": True}]
of_the_cpu = pytest.mark.devices("cpu")

Results = list[Tensor]


def losses_and_gradients(values: Tensor, target: Tensor, reductions: Sequence[str] = ("none", "mean")) -> Results:
    """By both strategies, one of them in place, and with statistics; with a gradient of the loss that is not 1."""
    results = []
    for reduction, options in itertools.product(reductions, WAYS):
        x = values.clone().requires_grad_()
        logits = x * 1  # a leaf cannot be written over
        loss = cross_entropy(logits, target, reduction=reduction, **options)
        loss, stats = loss if isinstance(loss, tuple) else (loss, ())
        (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, 0.7))
        results += [loss.detach(), gradient, *(s.detach() for s in stats)]
    return results


def softmaxes(values: Tensor) -> Results:
    results = []
    for function in FUNCTIONS:
        x = values.clone().requires_grad_()
        y = function(x, 1)
        y.backward(values)
        results += [y.detach(), x.grad]
    return results


def linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Results:
    results = []
    for reduction in ("none", "mean"):
        parameters = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss = linear_cross_entropy(*parameters, target, reduction=reduction)
        results += [loss.detach(), *torch.autograd.grad(loss, parameters, torch.full_like(loss, 0.7))]
    return results


def everything(values: Tensor, target: Tensor, reduction: str, precompute: bool) -> Results:
    """Loss, statistics and gradients; softmax and its gradient."""
    x = values.clone().requires_grad_()
    loss, stats = cross_entropy(
        x, target, reduction=reduction, label_smoothing=0.1, precompute_grad=precompute, return_stats=True
    )
    loss.backward(torch.full_like(loss, 0.5))
    results = [loss.detach(), *(s.detach() for s in stats), x.grad]
    return [*results, *softmaxes(values)]


# ---- runs and threads ------------------------------------------------------------------------------------------------


THREADS = [1, 2, 3, 7]
# Large enough that work is split: both layouts, many rows, few rows, many classes.
SHAPES = [(2000, 100), (20000, 10), (3, 50257), (4, 21, 64, 32), (2, 1000, 100)]


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_threads_or_run(shape, dtype, kind):
    values = torch.randn(shape).to(dtype)
    target = oracle.make_target(kind, shape, dtype)
    for reduction, precompute in [("mean", False), ("mean", True), ("sum", False), ("none", True)]:
        torch.set_num_threads(THREADS[0])
        first = everything(values, target, reduction, precompute)
        for threads in THREADS:
            torch.set_num_threads(threads)
            oracle.assert_same_bits(
                first, everything(values, target, reduction, precompute), (threads, reduction, precompute)
            )


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(800, 300), (24_000, 10), (4, 60, 1000)], ids=str)  # work for 7 threads
def test_every_run_with_any_threads(shape, dtype, device):
    values = (3 * torch.randn(shape)).to(dtype)
    target = oracle.make_target("int64", shape, dtype).to(device)
    values, first = values.to(device), None
    for threads, runs in RUNS.items():
        torch.set_num_threads(threads)
        for run in range(runs):
            results = [*losses_and_gradients(values, target), *softmaxes(values)]
            first = first or results
            oracle.assert_same_bits(results, first, (threads, run))


@of_the_cpu
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_run_of_linear_cross_entropy(dtype):
    """With one number of threads; whether another gives the same bits is up to the matrix products."""
    hidden, weight = torch.randn(200, 32).to(dtype), torch.randn(300, 32).to(dtype)
    target = torch.randint(300, (200,))
    for threads, runs in RUNS.items():
        torch.set_num_threads(threads)
        first = linear(hidden, weight, target)
        for run in range(1, runs):
            oracle.assert_same_bits(linear(hidden, weight, target), first, (threads, run))


# ---- places ----------------------------------------------------------------------------------------------------------


def by_itself(values: Tensor, target: Tensor) -> Results:
    """Of one row, or of several."""
    return [*losses_and_gradients(values, target, ["none"]), *softmaxes(values)]


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 17, 40, 5000])
def test_bits_of_a_row_do_not_depend_on_its_place(classes, dtype, kind):
    """Within one layout: in another order, and in the company of fewer rows."""
    rows = 6 if classes == 5000 else 300
    values = (3 * torch.randn(rows, classes)).to(dtype)
    target = oracle.make_target(kind, (rows, classes), dtype)
    for order, precompute in itertools.product(
        [torch.randperm(rows), torch.arange(1, rows), torch.arange(rows - 1), torch.arange(2), torch.arange(1)],
        [False, True],
    ):
        whole = everything(values, target, "none", precompute)
        part = everything(values[order], target[order], "none", precompute)
        oracle.assert_same_bits([t[order] for t in whole], part, (len(order), precompute))


@of_the_cpu
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 131, 1025, 5000])
def test_a_row_anywhere_in_a_batch(classes, dtype):
    """As the first of 1, the last of 7, and in the middle of as many as fill a tile and more."""
    row = (3 * torch.randn(1, classes)).to(dtype)
    expected = by_itself(row, torch.tensor([7]))
    for rows, place in [(2, 1), (7, 6), (17, 8), (150, 129)]:
        values = (3 * torch.randn(rows, classes)).to(dtype)
        target = torch.randint(classes, (rows,))
        values[place], target[place] = row[0], 7
        results = by_itself(values, target)
        oracle.assert_same_bits([t[place : place + 1] for t in results], expected, (rows, place))


@of_the_cpu
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 131, 1025])
def test_a_pixel_anywhere_in_an_image(classes, dtype):
    """Classes apart in memory, as a single pixel's are not: a row is a lane, or one of what is left at the end."""
    column = (3 * torch.randn(1, classes, 1)).to(dtype)
    two = by_itself(column.expand(1, classes, 2).contiguous(), torch.tensor([[7, 7]]))
    expected = [t[..., :1] for t in two]
    for pixels, place in [(2, 1), (7, 6), (17, 8), (150, 129)]:
        values = (3 * torch.randn(1, classes, pixels)).to(dtype)
        target = torch.randint(classes, (1, pixels))
        values[0, :, place], target[0, place] = column[0, :, 0], 7
        results = by_itself(values, target)
        oracle.assert_same_bits([t[..., place : place + 1] for t in results], expected, (pixels, place))


@of_the_cpu
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 131, 1025, 5000])
def test_rows_anywhere_in_memory(classes, dtype):
    """At every alignment that an element can have, the rows apart by any number of elements."""
    values = (3 * torch.randn(3, classes)).to(dtype)
    target = torch.tensor([0, 7, classes - 1])
    expected = [cross_entropy(values, target, reduction="none"), *(f(values, 1) for f in FUNCTIONS)]
    memory = torch.zeros(3 * (classes + 70) + 70, dtype=dtype)
    for offset, gap in itertools.product([0, 1, 3, 15, 31, 64], [0, 1, 64]):
        moved = memory.as_strided(values.shape, (classes + gap, 1), offset).copy_(values)
        results = [cross_entropy(moved, target, reduction="none"), *(f(moved, 1) for f in FUNCTIONS)]
        oracle.assert_same_bits(results, expected, (offset, gap))
        oracle.assert_same_bits(
            gradient_over(moved, target), gradient_over(values.clone(), target), ("in place", offset, gap)
        )


def gradient_over(logits: Tensor, target: Tensor) -> Results:
    """The gradient that takes the place of the logits, wherever they lie."""
    x = oracle.as_computed(logits)
    cross_entropy(x, target, reduction="sum", precompute_grad=True, inplace=True).backward()
    return [x.detach()]
