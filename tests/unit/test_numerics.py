"""Where cross entropy is easily wrong although random logits look right.

Peaked rows, outliers and offsets, infinite and NaN logits, ignored rows, no rows, one class. Everything is judged
against float64; where torch itself gives NaN although the mathematics gives a number, the test says so.

Peaked rows have an oracle of their own, exact_peaked: tools/oracle.py subtracts after the exponential, which loses what
is tested there.
"""

import itertools
import math

import mpmath
import oracle
import pytest
import torch
from torch import Tensor

from softmax_ext import cross_entropy

INF, NAN = float("inf"), float("nan")
ROWS = "rows of contiguous classes"
COLUMNS = "classes outermost in memory"
LAYOUTS = [ROWS, COLUMNS]


def laid_out(values: Tensor, layout: str) -> Tensor:
    return values.clone() if layout == ROWS else values.t().contiguous().t()


def run(values: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    """(loss, gradient)"""
    x = values.detach().requires_grad_()
    loss = cross_entropy(x, target, **options)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), x.grad


def check(values: Tensor, target: Tensor, weight: Tensor | None = None, exact_values: Tensor | None = None, **options):
    """Loss and gradient for every reduction, layout and strategy; NaN and infinities where the oracle has them.

    The oracle gets ``exact_values`` if given.
    """
    for reduction in ("none", "mean", "sum"):
        exact = oracle.cross_entropy(
            values if exact_values is None else exact_values, target, weight, reduction=reduction, **options
        )
        scale = oracle.gradient_scale(exact.grad, target, weight, reduction=reduction, **options)
        for layout, precompute in itertools.product(LAYOUTS, [False, True]):
            what = (reduction, layout, precompute, options)
            loss, grad = run(
                laid_out(values, layout),
                target,
                weight=weight,
                reduction=reduction,
                precompute_grad=precompute,
                **options,
            )
            oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, values.dtype), ("loss", what))
            roundings = oracle.gradient_roundings(values.dtype, precompute)
            allowed = oracle.tolerance("grad", exact.grad, values.dtype, scale=scale, roundings=roundings)
            oracle.assert_within(grad, exact.grad, allowed, ("gradient", what))


# ---- peaked rows -----------------------------------------------------------------------------------------------------


def peaked(doubt: float, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Three rows whose target has probability 1 - doubt, up to the rounding of its logit."""
    x = torch.randn(3, classes, dtype=torch.float64).to(dtype).double()
    target = torch.tensor([0, classes - 1, classes // 2])
    others = x.scatter(1, target[:, None], -INF).logsumexp(1, keepdim=True)
    return x.scatter(1, target[:, None], others + math.log((1 - doubt) / doubt)).to(dtype), target


def exact_peaked(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of each row in float64, with no subtraction after the exponential.

    S = sum over the other classes of exp(x_c - x_y); then loss = log1p(S), p_c = exp(x_c - x_y) / (1 + S) and
    p_y - 1 = -S / (1 + S).
    """
    x = x.detach().cpu().double()
    index = target.cpu()[:, None]
    e = (x - x.gather(1, index)).exp().scatter(1, index, 0.0)
    s = torch.tensor([math.fsum(row) for row in e.tolist()], dtype=torch.float64)[:, None]
    return s.log1p().squeeze(1), e.scatter(1, index, -s) / (1 + s)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("doubt", [1e-3, 1e-7])
@pytest.mark.parametrize("classes", [2, 17, 40, 1000, 5000, 50257])
def test_peaked_rows_keep_their_relative_precision(classes, doubt, dtype, layout, device):
    """The loss and the true class's gradient, each relative to itself: not 100 % wrong where p_y rounds to 1."""
    x, target = peaked(doubt, classes, dtype)
    exact_loss, exact_grad = exact_peaked(x, target)
    allowed_loss = oracle.tolerance("peaked", exact_loss, dtype)
    allowed = oracle.tolerance("peaked", exact_grad, dtype, scale=oracle.largest(exact_grad, 1))
    if dtype == torch.float64:  # here the reference is exact, unlike torch's
        unit = oracle.TOLERANCE["peaked"][dtype] * oracle.roundoff(dtype)
        allowed_loss, allowed = unit * exact_loss, unit * oracle.largest(exact_grad, 1)
    for precompute in (False, True):
        loss, grad = run(
            laid_out(x, layout).to(device), target.to(device), reduction="none", precompute_grad=precompute
        )
        oracle.assert_within(loss, exact_loss, allowed_loss, "loss")
        oracle.assert_within(grad, exact_grad, allowed, "gradient")
        true_class = grad.cpu().gather(1, target[:, None])
        assert torch.all(true_class < 0) or dtype == torch.float16, "float16 alone may underflow"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_peaked_rows_by_statistics(dtype, layout, device):
    x, target = peaked(1e-7, 40, dtype)
    exact_loss, _ = exact_peaked(x, target)
    stats = cross_entropy(laid_out(x, layout).to(device), target.to(device), return_stats=True)[1]
    work = oracle.arithmetic(dtype)
    unit = oracle.TOLERANCE["peaked"][work] * oracle.roundoff(work)
    oracle.assert_within(stats.nll, exact_loss, unit * exact_loss, "nll")


@pytest.mark.parametrize("dtype", oracle.HALVES, ids=str)
def test_gradient_of_a_certain_class_is_rounded_not_lost(dtype, device):
    """At p_y = 0.999 it is -0.001, which bfloat16 can hold; 1 rounded to bfloat16 minus 1 is 0."""
    x, target = peaked(1e-3, 1000, dtype)
    _, exact_grad = exact_peaked(x, target)
    _, grad = run(x.to(device), target.to(device), reduction="none")
    ours, exact = (g.cpu().double().gather(1, target[:, None]) for g in (grad, exact_grad))
    nearest = exact.to(dtype).double()
    neighbours = torch.stack(
        [torch.nextafter(nearest.to(dtype), torch.full_like(nearest, s).to(dtype)) for s in (-1, 1)]
    )
    assert torch.all((ours == nearest) | (ours == neighbours.double()).any(0))


# ---- outliers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_offset_of_whole_rows_changes_nothing(dtype, offset, kind, device):
    """The difference to the maximum is exact, so a row at 1e4 is as precise as the same row at 0."""
    for classes in (3, 40, 5000):
        # Multiples of 2^-9, of which the sum with 1e4 is exact in float32.
        values = (torch.randn(3, classes) * 3 * 512).round().div(512).to(dtype)
        target = oracle.make_target(kind, (3, classes), dtype)
        assert torch.equal((values + offset) - offset, values)
        check((values + offset).to(device), target.to(device), exact_values=values)
        check((values + offset).to(device), target.to(device), exact_values=values, label_smoothing=0.1)


@pytest.mark.parametrize("result", ["loss", "lse", "nll", "entropy"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_with_a_gradient_for_the_weight(offset, result, device):
    """By the plain formulas: a log-sum-exp that is rounded at 1e4 must not be subtracted from a logit."""

    def gradients(dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, ...]:
        x, q, w = (t.to(device, dtype).requires_grad_() for t in (values, target, weight))
        loss, stats = cross_entropy(x, q, w, z_loss=0.1, return_stats=True)
        of = loss if result == "loss" else getattr(stats, result).sum()
        return torch.autograd.grad(of, (x, w), materialize_grads=True)

    values = torch.randn(8, 40) + offset
    target, weight = oracle.make_target("probabilities", (8, 40), torch.float32), oracle.make_weight(40, torch.float32)
    for name, grad, exact in zip(
        ("logits", "weight"), gradients(torch.float32, device), gradients(torch.float64, "cpu"), strict=True
    ):
        allowed = oracle.tolerance("grad", exact, torch.float32, scale=oracle.largest(exact, -1))
        oracle.assert_within(grad, exact, allowed, name)


@pytest.mark.parametrize("result", ["loss", "lse", "nll", "entropy"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_in_second_derivatives(offset, result, device):
    """Double backward, and forward over reverse, are the plain formulas too."""

    def second(dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        x, v = (t.to(device, dtype) for t in (values, direction))

        def of(x: Tensor) -> Tensor:
            loss, stats = cross_entropy(x, target.to(device), label_smoothing=0.1, z_loss=0.1, return_stats=True)
            return loss if result == "loss" else getattr(stats, result).sum()

        forward_over_reverse = torch.func.jvp(torch.func.grad(of), (x,), (v,))[1]
        reverse_over_reverse = torch.func.grad(lambda x: (torch.func.grad(of)(x) * v).sum())(x)
        return forward_over_reverse, reverse_over_reverse

    values, direction = torch.randn(8, 40) + offset, torch.randn(8, 40)
    target = oracle.make_target("int64", (8, 40), torch.float32)
    for ours, exact in zip(second(torch.float32, device), second(torch.float64, "cpu"), strict=True):
        allowed = oracle.tolerance("grad", exact, torch.float32, scale=oracle.largest(exact, -1))
        oracle.assert_within(ours, exact, allowed, "second derivative")


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_single_outliers(size, dtype, kind, device):
    """At the first, a middle and the last class: as the maximum of a first block and of a later one."""
    for classes in (3, 40, 5000):
        values = torch.randn(4, classes).to(dtype)
        values[0, 0] = values[1, classes // 2] = values[2, -1] = size
        target = oracle.make_target(kind, (4, classes), dtype)
        for smoothing in (0.0, 0.1):
            check(values.to(device), target.to(device), label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_largest_finite_logit(dtype, device):
    values = torch.randn(3, 40).to(dtype)
    values[0, 1] = values[1, 1] = torch.finfo(dtype).max
    values[2, 3] = torch.finfo(dtype).min
    target = torch.tensor([1, 1, 2])
    check(values.to(device), target.to(device))


def test_largest_finite_logit_with_a_gradient_for_the_weight(device):
    """By the plain formulas, where the square of the log-sum-exp overflows: it must not count without z_loss."""
    values = torch.full((2, 3), 1e30, device=device, requires_grad=True)
    target, weight = torch.full((2, 3), 0.5, device=device), torch.ones(3, device=device, requires_grad=True)
    loss = cross_entropy(values, target, weight)
    exact = oracle.cross_entropy(values, target, weight)
    oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, torch.float32), "loss")
    grad, _ = torch.autograd.grad(loss, [values, weight])
    allowed = oracle.tolerance(
        "grad", exact.grad, torch.float32, scale=oracle.gradient_scale(exact.grad, target, weight)
    )
    oracle.assert_within(grad, exact.grad, allowed, "gradient")


def masked(classes: int, count: int, mask: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, probabilities, weight); the first ``count`` classes are at ``mask`` and without mass."""
    values = torch.randn(3, classes).to(dtype)
    values[:, :count] = mask
    probabilities, weight = torch.rand(3, classes).to(dtype), oracle.make_weight(classes, dtype)
    probabilities[:, :count] = weight[:count] = 0
    return values, probabilities / probabilities.sum(1, keepdim=True), weight


# The mask fills the first block of a row, 4096 classes of contiguous ones and 32 of others, and goes on in the next.
MASKED_BLOCKS = [(80, 40), (6000, 4500)]
FINITE_MASKS = [-1e4, -1e9, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("mask", FINITE_MASKS)
@pytest.mark.parametrize(("classes", "count"), MASKED_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_finite_masks(dtype, classes, count, mask, device):
    """Sums relative to a maximum of -1e9 must not stay in those relative to the real one."""
    values, probabilities, weight = masked(classes, count, mask, dtype)
    target = torch.tensor([count, classes - 1, (count + classes) // 2])
    check(values.to(device), probabilities.to(device))
    check(values.to(device), target.to(device), weight.to(device), label_smoothing=0.1)
    for y in (probabilities, target):
        exact = oracle.stats(oracle.double(values), oracle.double(y))
        for layout in LAYOUTS:
            _, stats = cross_entropy(laid_out(values, layout).to(device), y.to(device), return_stats=True)
            for name, ours, right in zip(("lse", "nll", "entropy"), stats, exact, strict=False):
                oracle.assert_within(ours, right, oracle.tolerance(name, right, dtype), (name, layout))


@pytest.mark.parametrize("mask", FINITE_MASKS)
def test_finite_masks_of_pixels(mask, device):
    values, probabilities, _ = masked(80, 40, mask, torch.float32)
    images = [t.t().reshape(1, 80, 3).to(device) for t in (values, probabilities)]
    exact = oracle.cross_entropy(*images, reduction="none").loss
    loss = cross_entropy(*images, reduction="none")
    oracle.assert_within(loss, exact, oracle.tolerance("loss", exact, torch.float32), "loss")


@pytest.mark.parametrize("mask", FINITE_MASKS)
@pytest.mark.parametrize(("classes", "count"), MASKED_BLOCKS)
def test_certain_class_behind_a_mask(classes, count, mask, device):
    """A loss of 1e-10 is small, but not negative: the maximum, which has all mass, is in a later block."""
    values, probabilities, _ = masked(classes, count, mask, torch.float32)
    target = torch.full((3,), classes - 3)
    values[:, -3] = 30
    probabilities.zero_()[:, -3] = 1
    exact, _ = exact_peaked(values, target)
    allowed = oracle.tolerance("peaked", exact, torch.float32)
    for layout, y in itertools.product(LAYOUTS, (probabilities, target)):
        options = {"reduction": "none", "return_stats": True}
        loss, stats = cross_entropy(laid_out(values, layout).to(device), y.to(device), **options)
        for result in (loss, stats.nll):
            assert torch.all(result > 0)
            oracle.assert_within(result, exact, allowed, layout)


@pytest.mark.parametrize("precompute_grad", [False, True])
@pytest.mark.parametrize("dtype", oracle.HALVES, ids=str)
def test_loss_scaling_saves_small_gradients(dtype, precompute_grad, device):
    """The mean over many rows is below float16's range; an upstream gradient has to lift it before it is lost."""
    values = (3 * torch.randn(4096, 40)).to(dtype)
    target = oracle.make_target("int64", (4096, 40), dtype)
    upstream = 2.0**16
    exact = oracle.cross_entropy(values, target, upstream=upstream)
    scale = oracle.gradient_scale(exact.grad, target, None, upstream=upstream)
    x = values.to(device).requires_grad_()
    loss = cross_entropy(x, target.to(device), dtype=torch.float32, precompute_grad=precompute_grad)
    (loss * upstream).backward()
    roundings = oracle.gradient_roundings(dtype, precompute_grad, scaled=True)
    allowed = oracle.tolerance("grad", exact.grad, dtype, scale=scale, roundings=roundings)
    allowed += oracle.underflow(dtype) * upstream / len(values)  # of the sum's gradient, which is precomputed
    oracle.assert_within(x.grad, exact.grad, allowed, precompute_grad)


# ---- -inf, +inf, NaN -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 17, 40, 5000])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_minus_infinity(dtype, classes, device):
    """A class that cannot occur; as the target it costs +inf, and with smoothing anywhere in the row."""
    values = torch.randn(5, classes).to(dtype)
    values[0, 1] = -INF
    values[1, :-1] = -INF  # the target alone is left: loss 0
    values[2, 0] = -INF  # the target
    values[3, : classes // 2 + 1] = -INF  # whole vectors, and with many classes a whole block
    target = torch.tensor([0, classes - 1, 0, classes - 1, 1])
    for smoothing in (0.0, 0.1):
        check(values.to(device), target.to(device), label_smoothing=smoothing)
    loss, _ = run(values.to(device), target.to(device), reduction="none")
    assert loss[2] == INF
    assert loss[1] == 0


@pytest.mark.parametrize("classes", [3, 17, 40])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_minus_infinity_without_target_mass(dtype, classes, device):
    """0 * inf is 0 for a class without mass: lim of q (lse - z). Torch gives NaN; the mathematics wins."""
    values = torch.randn(3, classes).to(dtype)
    target = oracle.make_target("probabilities", (3, classes), dtype)
    values[0, 1] = values[2, 0] = values[2, 2] = -INF
    target[values == -INF] = 0
    torchs = torch.nn.functional.cross_entropy(values, target, reduction="none")
    assert torchs[0].isnan(), "torch has changed: compare with it"
    # A logit so low that its exponential is 0 in float64 too; the row's other terms do not see it.
    finite = values.double().masked_fill(values == -INF, -1e4)
    check(values.to(device), target.to(device), exact_values=finite)
    # The same by a class weight of 0, where smoothing gives every class mass.
    weight = oracle.make_weight(classes, dtype)
    weight[:3] = 0
    check(values.to(device), target.to(device), weight.to(device), exact_values=finite, label_smoothing=0.1)
    indices = torch.full((3,), classes - 1)
    if classes > 3:
        check(values.to(device), indices.to(device), weight.to(device), exact_values=finite, label_smoothing=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(4, 300), (4, 2047), (4, 32000), (2, 2047, 3)], ids=str)
@pytest.mark.parametrize(
    "units",
    [
        pytest.param(8, marks=pytest.mark.devices("cpu")),
        pytest.param(16, marks=pytest.mark.devices("cuda", "emulated")),  # a thread adds more terms in a row
    ],
)
def test_one_class_with_most_of_the_mass(units, shape, smoothing, device):
    """Sums of masses and logits where every small term would be rounded at the size of a large one, the same way."""
    target = torch.zeros(shape).scatter_(1, torch.randint(shape[1], (shape[0], 1, *shape[2:])), 1.0)
    if not smoothing:
        target = 0.9 * target + 0.1 / shape[1]
    for values in (torch.zeros(shape), torch.randn(shape)):
        loss, _ = run(values.to(device), target.to(device), reduction="none", label_smoothing=smoothing)
        exact = oracle.cross_entropy(values, target, reduction="none", label_smoothing=smoothing).loss
        oracle.assert_within(loss, exact, units * oracle.roundoff(torch.float32) * exact, "loss")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_minus_infinity_with_a_gradient_for_the_weight(smoothing, device):
    """Infinite as torch's is, for the classes and rows that have mass there; of no mass it is 0."""
    values, weight = torch.tensor([[0.0, -INF, 1.0], [1.0, 2.0, -INF]]), torch.tensor([1.0, 2.0, 0.5])
    target = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    gradients = []
    for function, where in ((cross_entropy, device), (torch.nn.functional.cross_entropy, "cpu")):
        w = weight.to(where).requires_grad_()
        loss = function(values.to(where), target.to(where), w, label_smoothing=smoothing, reduction="none")
        gradients.append(torch.autograd.grad(loss, w, torch.tensor([1.0, -1.0], device=where))[0].cpu())
    ours, torchs = gradients
    if not smoothing:
        assert torchs[2].isnan(), "torch has changed: compare with it"  # 0 * inf
        torchs[2] = 0
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("mass", [0.0, 0.5])
@pytest.mark.parametrize("zero", [True, False])
def test_minus_infinity_with_every_gradient(zero, mass, smoothing, device):
    """A gradient for the class weights, which has the plain formulas, changes no other: infinite, 0 or finite.

    At a logit of -inf a probability's is infinite, with or without mass, unless what it is multiplied by is 0; a class
    weight's is where there is mass, even if the weight itself is 0. In forward mode and in reverse.
    """
    values = torch.tensor([[0.5, -INF, 1.0], [1.0, 2.0, -1.0]], dtype=torch.float64, device=device)
    target = torch.tensor([[0.5, mass, 0.5], [0.5, 0.25, 0.25]], dtype=torch.float64, device=device)
    weight = torch.tensor([1.5, 0.0 if zero else 1.0, 0.5], dtype=torch.float64, device=device)
    grads = []
    for needs_weight in (False, True):
        leaves = [values.clone().requires_grad_(), target.clone().requires_grad_()]
        w = weight.clone().requires_grad_(needs_weight)
        loss, stats = cross_entropy(*leaves, w, label_smoothing=smoothing, reduction="sum", return_stats=True)
        inputs = [*leaves, w] if needs_weight else leaves
        grads.append([torch.autograd.grad(o, inputs, retain_graph=True) for o in (loss, loss + 2 * stats.nll.sum())])
    for of_kernel, (*of_formulas, of_weight) in zip(*grads, strict=True):
        torch.testing.assert_close(of_formulas, list(of_kernel))
        smoothed = (1 - smoothing) * target + smoothing / 3
        surprise = values.logsumexp(1, keepdim=True) - values
        torch.testing.assert_close(of_weight, torch.where(smoothed == 0, 0, smoothed * surprise).sum(0))
    assert grads[1][0][1][0, 1] == (0 if zero or smoothing == 1 else INF)

    def loss_of(q, w):
        return cross_entropy(values, q, w, label_smoothing=smoothing, reduction="sum")

    # Forward mode multiplies an infinite loss's terms by tangents of 0.
    for jacobian in (torch.func.jacrev, torch.func.jacfwd) if loss.isfinite() else (torch.func.jacrev,):
        of_target, of_weight = jacobian(loss_of, (0, 1))(target, weight)
        torch.testing.assert_close([of_target, of_weight], [grads[1][0][1], grads[1][0][2]])


def test_vanishing_mass_at_minus_infinity_with_a_gradient_for_the_weight(device):
    """Weight times probability is 0 in the arithmetic though neither is: no mass, by the formulas as by the kernel."""
    values = torch.tensor([[1.0, 2.0, -INF]], device=device)
    target = torch.tensor([[0.5, 0.5, 1e-30]], device=device)
    weight = torch.tensor([1.0, 1.0, 1e-30], device=device)
    losses = [cross_entropy(values, target, weight.clone().requires_grad_(needs)) for needs in (False, True)]
    assert losses[0].isfinite()
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("special", ["weight", "probability", "upstream"])
def test_infinite_operands_with_a_gradient_for_the_weight(special, device):
    """Finite logits and another operand infinite: the loss and a probability's gradient as the kernels have them."""
    values = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    target = torch.tensor([[INF if special == "probability" else 0.3, 0.2, 0.5]], device=device).requires_grad_()
    weight = torch.tensor([INF if special == "weight" else 1.0, 1.0, 1.0], device=device)
    upstream = torch.tensor(INF if special == "upstream" else 1.0, device=device)
    results = []
    for needs in (False, True):
        loss = cross_entropy(values, target, weight.clone().requires_grad_(needs))
        results.append((loss, *torch.autograd.grad(loss, target, upstream)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("value", [NAN, INF])
def test_probabilities_that_are_none_with_a_gradient_for_the_weight(value, smoothing, device):
    """They make the loss what the kernels make it, also where smoothing leaves nothing of them."""
    values, weight = torch.tensor([[1.0, 2.0, 3.0]], device=device), torch.ones(3, device=device)
    target = torch.tensor([[value, 0.5, 0.5]], device=device)
    losses = [
        cross_entropy(values, target, weight.clone().requires_grad_(needs), label_smoothing=smoothing)
        for needs in (False, True)
    ]
    assert not losses[0].isfinite()
    torch.testing.assert_close(losses[1], losses[0], equal_nan=True)


@pytest.mark.parametrize("formulas", [False, True])
def test_statistics_under_another_default_dtype(formulas, device):
    """Float32 for operands of float32, whatever torch.set_default_dtype says."""
    values, target = torch.zeros(2, 3, device=device), torch.full((2, 3), 1 / 3, device=device)
    weight = torch.ones(3, device=device, requires_grad=formulas)
    torch.set_default_dtype(torch.float64)
    try:
        loss, stats = cross_entropy(values, target, weight, return_stats=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in (loss, stats.lse, stats.nll, stats.entropy)} == {torch.float32}


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_softcap_of_infinities(dtype, device):
    """Tanh(inf) = 1: ordinary capped logits of slope 0."""
    values = torch.randn(2, 40).to(dtype)
    values[0, 1], values[1, 2] = -INF, INF
    target = torch.tensor([0, 2])
    loss, grad = run(values.to(device), target.to(device), reduction="none", softcap=5.0)
    finite = values.double().clamp(-1e4, 1e4)
    exact = oracle.cross_entropy(finite, target, reduction="none", softcap=5.0)
    rounded_z = oracle.conditioning(finite, softcap=5.0)
    oracle.assert_within(
        loss, exact.loss, oracle.tolerance("loss", exact.loss, dtype, scale=exact.loss * rounded_z), "loss"
    )
    scale = oracle.largest(exact.grad, 1) * rounded_z.unsqueeze(1)
    oracle.assert_within(grad, exact.grad, oracle.tolerance("grad", exact.grad, dtype, scale=scale), "gradient")


def exact_capped(values: Tensor, softcap: float, logit_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the sum of the losses at class 0, and its derivative along ones, by 40 digits.

    And the size of that derivative's terms, p - 1 taken as two: the formulas subtract there.
    """
    mp = mpmath.mp
    first, second, terms = [], [], []
    with mp.workdps(40):
        cap, scale = mp.mpf(softcap), mp.mpf(logit_scale)
        for row in values.tolist():
            u = [scale * mp.mpf(x) / cap for x in row]
            e = [mp.exp(cap * mp.tanh(v)) for v in u]
            total = mp.fsum(e)
            slope = [scale * mp.sech(v) ** 2 for v in u]
            mean_slope = mp.fsum(a * s for a, s in zip(e, slope, strict=True)) / total
            for c, (v, s) in enumerate(zip(u, slope, strict=True)):
                p = e[c] / total
                residual = -mp.fsum(e[1:]) / total if c == 0 else p
                curvature = -2 * mp.tanh(v) * s * scale / cap
                first.append(float(residual * s))
                second.append(float(p * (s - mean_slope) * s + residual * curvature))
                terms.append(float(p * mp.fabs(s - mean_slope) * mp.fabs(s) + (p + (c == 0)) * mp.fabs(curvature)))
    return tuple(torch.tensor(t, dtype=torch.float64).view(values.shape) for t in (first, second, terms))


@pytest.mark.parametrize("logit_scale", [1.0, -0.7])
@pytest.mark.parametrize("classes", [3, 40, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_logits_far_beyond_the_cap(dtype, classes, logit_scale, device):
    """Each value is as exact as its own size asks for: 1 - tanh² of such logits would have few digits, or none.

    The mean relative error of torch's composition is 0.003 to 0.1 here in float32.
    """
    cap, scale = 5.0, float(torch.tensor(logit_scale, dtype=dtype))
    values = torch.linspace(-45, 45, 4 * classes, dtype=torch.float64).view(4, classes).to(dtype)
    values[0, 0], values[1, 0], values[2, 1], values[3, 0] = 40.0, -40.0, 0.0, 1e-3
    target = torch.zeros(4, dtype=torch.int64, device=device)
    exact, exact_second, terms = exact_capped(values, cap, scale)
    bound = 24 * torch.finfo(dtype).eps  # z is rounded at 5, which p has relative to itself
    for layout, precompute in itertools.product(LAYOUTS, [False, True]):
        at = laid_out(values.to(device), layout)
        options = {"reduction": "sum", "softcap": cap, "logit_scale": scale, "precompute_grad": precompute}
        _, grad = run(at, target, **options)
        error = ((grad.cpu().double() - exact) / exact).abs().max()
        assert error <= bound, (layout, precompute, error)
        x = at.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(x, target, **options), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        error = ((second.cpu().double() - exact_second).abs() / terms).max()
        assert error <= 4 * bound, (layout, precompute, error)


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("classes", [3, 17, 40, 5000])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_rows_without_a_distribution(dtype, classes, kind, device):
    """All -inf, a +inf, a NaN: NaN loss and gradients as in torch, and nothing of it in the other rows."""
    values = torch.randn(8, classes).to(dtype)
    values[1] = -INF
    values[3, 1] = INF  # not the target
    values[4, -1] = INF  # the target
    values[5, 1] = NAN
    values[6, 0] = values[6, 2] = NAN
    target = oracle.make_target(kind, (8, classes), dtype)
    if kind == "int64":
        target[4], target[6] = classes - 1, 1
    check(values.to(device), target.to(device))
    loss, grad = run(values.to(device), target.to(device), reduction="none")
    sick = torch.tensor([1, 3, 4, 5, 6])
    well = torch.tensor([0, 2, 7])
    assert loss[sick].isnan().all()
    assert grad[sick].isnan().all()
    assert loss[well].isfinite().all()
    assert grad[well].isfinite().all()


@pytest.mark.parametrize("value", [-INF, INF, NAN, None], ids=str)
def test_rows_without_a_distribution_with_a_gradient_for_the_weight(value, device):
    """NaN as the kernels' statistics are, by the plain formulas; None: rows without classes."""
    values = torch.zeros(2, 0, device=device) if value is None else torch.full((2, 3), value, device=device)
    target, weight = torch.full_like(values, 0.5), torch.ones(values.shape[1], device=device)
    calls = [
        cross_entropy(values, target, w, reduction="none", z_loss=0.1, return_stats=True)
        for w in (weight, weight.clone().requires_grad_())
    ]
    for loss, stats in calls:
        assert loss.isnan().all()
        assert stats.lse.isnan().all()


@pytest.mark.parametrize("classes", [3, 40])
def test_prediction_of_special_rows(classes, device):
    """As torch.argmax: the first NaN, the first +inf, 0 for a row of -inf."""
    values = torch.zeros(5, classes)
    values[0, 2] = NAN
    values[1, 1] = INF
    values[1, 2] = NAN
    values[2] = -INF
    values[3, 1] = values[3, 2] = INF
    values[4, :2] = -INF
    target = torch.zeros(5, dtype=torch.int64)
    for layout in LAYOUTS:
        stats = cross_entropy(laid_out(values, layout).to(device), target.to(device), return_stats=True)[1]
        assert stats.prediction.tolist() == values.argmax(1).tolist(), layout


# ---- ignored rows, no rows, one class --------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [3, 17, 40, 200])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_ignored_rows_may_hold_anything(dtype, classes, smoothing, device):
    """Their loss and gradient are 0 whatever their logits. Torch multiplies by 0, which leaves NaN of NaN."""
    values = torch.randn(7, classes).to(dtype)
    clean = values.clone()
    values[1], values[2, 1], values[3, 0], values[5] = NAN, INF, -INF, -INF
    target = torch.tensor([0, -100, -100, -100, 2, -100, 1])
    check(values.to(device), target.to(device), exact_values=clean, label_smoothing=smoothing)
    options = {"label_smoothing": smoothing, "z_loss": 0.1, "return_stats": True}
    for layout, precompute_grad in itertools.product(LAYOUTS, [False, True]):
        x = laid_out(values, layout).to(device).requires_grad_()
        loss, stats = cross_entropy(x, target.to(device), precompute_grad=precompute_grad, **options)
        loss.backward()
        assert torch.all(x.grad[target == -100] == 0)
        assert torch.all(stats.nll[target == -100] == 0)


@pytest.mark.parametrize("precompute_grad", [False, True])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_upstream_infinity_of_an_ignored_row(dtype, precompute_grad, device):
    """Its gradient is 0, and not 0 * inf, also where it was written before the upstream gradient was known."""
    for classes, layout in itertools.product((3, 40), LAYOUTS):
        x = laid_out(torch.randn(3, classes).to(dtype), layout).to(device).requires_grad_()
        target = torch.tensor([0, -100, 2], device=device)
        loss = cross_entropy(x, target, reduction="none", precompute_grad=precompute_grad)
        loss.backward(torch.tensor([1, INF, 1], dtype=dtype, device=device))
        assert torch.all(x.grad[1] == 0)
        assert torch.all(x.grad[[0, 2]].isfinite())
        assert torch.all(x.grad[[0, 2]] != 0)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("ignore_index", [1, 200])
@pytest.mark.parametrize("classes", [3, 40])
def test_every_row_ignored(classes, ignore_index, index_dtype, device):
    """Mean: 0/0 = NaN, and no gradient, whether the index is a class or not."""
    values = torch.randn(5, classes, device=device)
    target = torch.full((5,), ignore_index, dtype=index_dtype, device=device)
    weight = oracle.make_weight(classes, torch.float32).to(device)
    for w, smoothing, precompute in itertools.product([None, weight], [0.0, 0.1], [False, True]):
        options = {
            "weight": w,
            "ignore_index": ignore_index,
            "label_smoothing": smoothing,
            "precompute_grad": precompute,
        }
        for reduction, right in (("mean", NAN), ("sum", 0.0), ("none", 0.0)):
            loss, grad = run(values, target, reduction=reduction, **options)
            assert torch.equal(loss.nan_to_num(7.0), torch.full_like(loss, right).nan_to_num(7.0)), reduction
            assert torch.all(grad == 0), reduction


@pytest.mark.parametrize("kind", ["int64", "uint8", "probabilities"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 1), (0, 40), (0, 5, 3), (2, 5, 0), (0, 40, 0)], ids=str)
def test_no_rows(shape, kind, device):
    values = torch.randn(shape, device=device)
    batch = (shape[0], *shape[2:])
    target = torch.rand(shape) if kind == "probabilities" else torch.zeros(batch, dtype=getattr(torch, kind))
    target = target.to(device)
    for precompute in (False, True):
        loss, grad = run(values, target, precompute_grad=precompute)
        assert loss.isnan()
        assert grad.shape == shape
        loss, grad = run(values, target, reduction="sum", precompute_grad=precompute)
        assert loss == 0
        loss, grad = run(values, target, reduction="none", precompute_grad=precompute)
        assert loss.shape == batch
        assert grad.shape == shape
    _, stats = cross_entropy(values, target, return_stats=True)
    assert all(s.shape == batch for s in stats)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (131, 1), (2, 1, 3)], ids=str)
def test_one_class(shape, dtype, device):
    """p = 1: no loss and no gradient, exactly."""
    values = (100 * torch.randn(shape)).to(dtype).to(device)
    batch = shape[:1] * (len(shape) > 1) + shape[2:]
    target = torch.zeros(batch, dtype=torch.int64, device=device)
    for precompute in (False, True):
        loss, grad = run(values, target, reduction="none", precompute_grad=precompute)
        assert torch.all(loss == 0)
        assert torch.all(grad == 0)
    _, stats = cross_entropy(values, target, return_stats=True)
    assert torch.all(stats.nll == 0)
    assert torch.all(stats.entropy == 0)
    assert torch.all(stats.prediction == 0)
    assert torch.equal(stats.lse, values.select(min(1, values.dim() - 1), 0).to(stats.lse.dtype))


def test_targets_of_no_weight(device):
    """The mean divides by the sum of the targets' weights: 0/0, as in torch."""
    values = torch.randn(3, 4, device=device)
    weight = torch.tensor([0.0, 1, 1, 1], device=device)
    target = torch.zeros(3, dtype=torch.int64, device=device)
    assert cross_entropy(values, target, weight).isnan()
    assert cross_entropy(values, target, weight, reduction="sum") == 0


# ---- many classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.5}], ids=["plain", "smoothing"])
@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("shape", [(2, 2048, 200), (300, 64), (300, 128), (8, 5000)], ids=str)
def test_sums_over_many_classes_are_exact(shape, kind, options, device):
    x = torch.randn(shape) * 2
    target = oracle.make_target(kind, shape, torch.float32)
    exact = oracle.cross_entropy(x, target, reduction="none", **options).loss
    loss = cross_entropy(x.to(device), target.to(device), reduction="none", **options)
    oracle.assert_within(loss, exact, oracle.tolerance("sums", exact, torch.float32), (shape, kind, options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [33, 128, 129, 1023, 1025, 2047, 2048, 2049, 4111, 262144, 262145])
def test_where_the_kernels_change_their_way(classes, dtype, device):
    """Rows in tiles or alone, copied whole or read in place, one block or several, exponentials kept or not."""
    target = torch.tensor([0, classes - 1, classes // 2])
    values = torch.randn(3, classes).to(dtype)
    values[2, classes - 1] += 12  # the maximum in the last, partial vector
    check(values.to(device), target.to(device))
    check(values.to(device), target.to(device), (torch.rand(classes) + 0.5).to(device), label_smoothing=0.1)


# ---- as the fused sum of the losses is taken -------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_sum_is_the_sum_of_the_losses(smoothing, device):
    """Also where a target's logit is -inf and only the smoothing counts."""
    x = torch.randn(300, 10, device=device)
    target = torch.randint(10, (300,), device=device)
    target[::7] = -100
    each = cross_entropy(x, target, label_smoothing=smoothing, reduction="none").double().sum()
    total = cross_entropy(x, target, label_smoothing=smoothing, reduction="sum")
    oracle.assert_within(total, each, oracle.tolerance("loss", each, torch.float32), smoothing)
    x[1, target[1]] = -INF
    assert cross_entropy(x, target, label_smoothing=smoothing, reduction="sum") == INF


def test_sum_of_tiny_losses_keeps_them(device):
    """Rows whose losses are far below the spacing of 1 in any dtype."""
    x = torch.zeros(500, 3, dtype=torch.float64, device=device)
    x[:, 0] = 45.0
    target = torch.zeros(500, dtype=torch.int64, device=device)
    exact = torch.tensor(500 * math.log1p(2 * math.exp(-45.0)), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        loss = cross_entropy(x.to(dtype), target, reduction="sum")
        assert loss > 0
        oracle.assert_within(loss, exact, oracle.tolerance("peaked", exact, torch.float32), dtype)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("position", [0, 500])
def test_float64_sum_keeps_what_the_additions_round_off(position):
    """After a loss of 2^53 each addition of 41 adds 40. torch's own sum is off by 16."""
    losses = torch.full((1000,), 41.0, dtype=torch.float64)
    losses[position] = 2.0**53
    x = torch.full((1000, 200), -torch.inf, dtype=torch.float64)
    x[:, 0], x[:, 1] = 0, losses
    target = torch.zeros(1000, dtype=torch.int64)
    exact = math.fsum(cross_entropy(x, target, reduction="none").tolist())
    assert exact == 2.0**53 + 999 * 41
    assert cross_entropy(x, target, reduction="sum").item() == exact
    assert cross_entropy(x, target).item() == exact / 1000


@pytest.mark.parametrize("layout", [(5, 0), (5, 0, 3)], ids=str)
def test_no_classes(layout, device):
    """A row without classes has no distribution."""
    x = torch.empty(layout, device=device)
    loss, stats = cross_entropy(x, x.clone(), reduction="none", z_loss=0.1, return_stats=True)
    assert loss.isnan().all()
    assert stats.lse.isnan().all()
    assert stats.entropy.isnan().all()
    assert (stats.prediction == 0).all()
