"""What results are compared with, and how far they may be from it: the float64 oracle and the one table of tolerances.

The oracle gets float64 copies of the same, already rounded, inputs. It is torch's own functions; the options that torch
lacks are written out here, from their definition. Nothing is taken from softmax_ext. An error is judged value by value:

    |actual - exact|  <=  roundings * u(result's dtype) * |exact|  +  TOLERANCE * u(arithmetic's dtype) * scale

u is the unit roundoff. The first term is the rounding of a right result, once. The second is the error of the
arithmetic, float32 for the half types as well: a sum that is kept in bfloat16 misses it by a factor of thousands.
``scale`` is the magnitude that the error is relative to: the value's own for losses, the largest gradient of the same
row for gradients. That is stricter than "never worse than torch, plus rounding", which is tested on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]

# In units of roundoff of the arithmetic. In float64 the oracle is no more exact than what it judges (it subtracts
# logits from their log-sum-exp and sums all classes one by one): the table says only that no float32 was in the way.
SAME_ARITHMETIC = 512
# In float32 most of the error is the rounding of z_c - max z, of up to 8 u for a difference between 8 and 16.
TOLERANCE = {
    "loss": {torch.float64: SAME_ARITHMETIC, torch.float32: 16},
    "grad": {torch.float64: SAME_ARITHMETIC, torch.float32: 16},
    "grad_target": {torch.float64: SAME_ARITHMETIC, torch.float32: 16},
    "lse": {torch.float64: SAME_ARITHMETIC, torch.float32: 4},
    "nll": {torch.float64: SAME_ARITHMETIC, torch.float32: 16},
    "entropy": {torch.float64: SAME_ARITHMETIC, torch.float32: 16},
    "softmax": {torch.float64: SAME_ARITHMETIC, torch.float32: 8},
    "log_softmax": {torch.float64: SAME_ARITHMETIC, torch.float32: 16},
    "softmax_grad": {torch.float64: SAME_ARITHMETIC, torch.float32: 8},
    "log_softmax_grad": {torch.float64: SAME_ARITHMETIC, torch.float32: 8},
    # Of a loss or a probability of 1e-7, relative to itself, with a reference that is exact in float64 too.
    "peaked": {torch.float64: 64, torch.float32: 16},
    # Of losses that sum many classes of like size: a single float32 chain of them would be 10 times as far off.
    "sums": {torch.float64: SAME_ARITHMETIC, torch.float32: 4},
}
# Set for the CUDA kernels, whose float32 exponential of d <= 0 is off by up to 2 + |d| units in the last place. A small
# loss, and the gradient of a row with one, is a sum of such exponentials with |d| = -log of it or less: its tolerance
# grows by 2 |d| u.
fast_exponential = False
EXP_ULPS = 1.01  # of the kernels' float32 exponential, in units in the last place


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def underflow(dtype: torch.dtype) -> float:
    """The largest absolute error of rounding to nearest where numbers are subnormal; in float64 all of the last bit."""
    return max(torch.finfo(dtype).smallest_normal * roundoff(dtype), math.ulp(0.0))


def arithmetic(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def largest(values: Tensor, dim: int) -> Tensor:
    """The largest magnitude of each row along dim, for every value of the row."""
    if values.numel() == 0:
        return values.abs()
    return values.nan_to_num(0, 0, 0).abs().amax(dim, keepdim=True).expand_as(values)


def tolerance(
    quantity: str,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    scale: Tensor | None = None,
    arithmetic_dtype: torch.dtype | None = None,
    roundings: int = 1,
) -> Tensor:
    """The error that each value may have; see above. ``scale`` defaults to the exact values themselves."""
    work = arithmetic_dtype or arithmetic(dtype)
    if work == dtype:
        roundings -= 1  # the table's arithmetic ends with it
    scale = exact if scale is None else scale
    if work == torch.float32 and quantity in ("loss", "nll", "log_softmax", "peaked"):
        scale = scale * _room(scale.abs(), TOLERANCE[quantity][work])
    if work == torch.float64:
        scale = scale.abs() + 1  # the oracle's logits and sums are of this magnitude, however small its result
    allowed = TOLERANCE[quantity][work] * roundoff(work) * scale.abs().nan_to_num(0, 0, 0)
    return allowed + roundings * roundoff(dtype) * exact.abs().nan_to_num(0, 0, 0) + roundings * underflow(dtype)


def _room(small: Tensor, tolerance: float) -> Tensor:
    """By which a tolerance grows for what is a sum of exponentials as small as this."""
    if not fast_exponential:
        return torch.ones_like(small)
    return 1 - 2 * small.log().clamp(-100, 0).nan_to_num(0) / tolerance


def assert_within(actual: Tensor, exact: Tensor, allowed: Tensor, what: object) -> None:
    """Every value within its own bound, and NaN or infinite exactly where the exact value is."""
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)} instead of {list(exact.shape)}"
    ours, exact, allowed = actual.detach().to("cpu", torch.float64), exact.detach().cpu(), allowed.detach().cpu()
    error = (ours - exact).abs()
    good = error <= allowed  # false for NaN
    if good.all():
        return
    bad = ~(good | (ours == exact) | (ours.isnan() & exact.isnan()))
    if not bad.any():
        return
    excess = (error / allowed).nan_to_num(float("inf")).masked_fill(~bad, -1.0)
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), exact.shape))
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {bad.numel()} values are off; the worst at {list(at)}: "
        f"{actual[at].item()!r} instead of {exact[at].item()!r}, error {error[at].item():.3g}, "
        f"allowed {allowed.expand_as(exact)[at].item():.3g}"
    )


# ---- cross entropy ---------------------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """Float64 results on float64 copies of the arguments; gradients for the upstream gradient of the loss."""

    loss: Tensor
    grad: Tensor
    grad_target: Tensor | None


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: object) -> None:
    """0 and -0 are different ones."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        word = words[one.element_size()]
        assert one.dtype == other.dtype, (i, what)
        assert torch.equal(one.contiguous().view(word), other.contiguous().view(word)), (i, what)


def class_dim(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def double(tensor: Tensor | None) -> Tensor | None:
    """A float64 copy on the CPU; class indices become int64."""
    if tensor is None:
        return None
    return tensor.detach().cpu().to(torch.float64 if tensor.is_floating_point() else torch.int64).clone()


def transformed(input: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """z in float64, classes last."""
    z = input.movedim(class_dim(input), -1)
    return logit_scale * z if softcap is None else softcap * tanh(logit_scale * z / softcap)


def tanh(u: Tensor) -> Tensor:
    """Torch's derivative of it is 1 - tanh^2, which cancels; this has the derivatives of sums of logistic functions."""
    alike = torch.where(u > 0, -2 * torch.sigmoid(-2 * u), 2 * torch.sigmoid(2 * u))
    return torch.tanh(u).detach() + (alike - alike.detach())


def conditioning(input: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0, **_: object) -> Tensor:
    """For each row, what the relative errors of all results grow by where z itself is rounded: by 1 + max |z|."""
    z = transformed(double(input), softcap, logit_scale)
    if softcap is None and logit_scale == 1:
        return torch.ones(z.shape[:-1], dtype=torch.float64)
    return 1 + z.abs().amax(-1)


def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: float | None = None,
    row_weight: Tensor | str | None = None,
) -> Tensor:
    """Torch's loss of the transformed logits, and z_loss lse^2 for each row. Differentiable to any order.

    A mean divides the first by the class weights of the rows, the second by the rows, if no denominator is given.
    """
    if row_weight is not None:
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        options |= {"softcap": softcap, "logit_scale": logit_scale, "reduction": "none"}
        factors = row_factors(input, target, row_weight, ignore_index, softcap=softcap, logit_scale=logit_scale)

        def weighed(rows: Tensor) -> Tensor:
            return torch.where(factors == 0, 0, factors * torch.where(factors == 0, 0, rows))

        rows = weighed(cross_entropy_loss(input, target, weight, **options))
        penalty = weighed(z_terms(input, target, ignore_index, z_loss, softcap, logit_scale))
        if reduction == "none":
            return rows + penalty
        if denominator is None and reduction == "mean":
            shares = 1 if isinstance(row_weight, str) else factors
            totals = [total_weight(target, w, class_dim(input), ignore_index, shares) for w in (weight, None)]
            return rows.sum() / totals[0] + (penalty.sum() / totals[1] if z_loss != 0 else 0)
        return (rows + penalty).sum() / (denominator if reduction == "mean" else 1)
    if denominator is not None:
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
        options |= {"softcap": softcap, "logit_scale": logit_scale, "reduction": "sum"}
        return cross_entropy_loss(input, target, weight, **options) / denominator
    dim = class_dim(input)
    z = transformed(input, softcap, logit_scale).movedim(-1, dim)
    loss = F.cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss == 0:
        return loss
    penalty = z_terms(input, target, ignore_index, z_loss, softcap, logit_scale)
    if reduction == "none":
        return loss + penalty
    if reduction == "sum":
        return loss + penalty.sum()
    return loss + penalty.sum() / total_weight(target, None, dim, ignore_index)


def z_terms(
    input: Tensor, target: Tensor, ignore_index: int, z_loss: float, softcap: float | None, logit_scale: float
) -> Tensor:
    """z_loss lse^2 of each row; 0 where it is ignored."""
    dim = class_dim(input)
    penalty = z_loss * logsumexp(transformed(input, softcap, logit_scale).movedim(-1, dim), dim).square()
    return penalty if target.is_floating_point() else torch.where(target != ignore_index, penalty, 0)


def row_factors(
    input: Tensor, target: Tensor, row_weight: Tensor | str, ignore_index: int = -100, **transformation: Any
) -> Tensor:
    """What each row's loss is multiplied by, a constant; 0 where it is ignored."""
    live = torch.ones_like(row_weight) if target.is_floating_point() else target != ignore_index
    if isinstance(row_weight, str):
        log_p = transformed(input.detach(), **transformation).log_softmax(-1)
        row_weight = log_p.gather(-1, torch.where(live, target, 0).unsqueeze(-1)).squeeze(-1).exp()
    return torch.where(live.bool(), double(row_weight), 0)


def total_weight(
    target: Tensor, weight: Tensor | None, dim: int, ignore_index: int, factors: Tensor | float = 1
) -> Tensor:
    """What the mean divides by: the rows, or for classes the weights of those which are not ignored."""
    if target.is_floating_point():
        return (torch.ones(target.movedim(dim, -1).shape[:-1], dtype=torch.float64) * factors).sum()
    live = target != ignore_index
    shares = live.double() if weight is None else torch.where(live, weight[torch.where(live, target, 0)], 0)
    return (shares * factors).sum()


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, upstream: Tensor | float = 1.0, **options: object
) -> Exact:
    x, y, w = double(input), double(target), double(weight)
    x.requires_grad_()
    y.requires_grad_(y.is_floating_point())
    loss = cross_entropy_loss(x, y, w, **options)
    loss.backward(torch.as_tensor(upstream, dtype=torch.float64).cpu().expand_as(loss))
    return Exact(loss.detach(), x.grad, y.grad)


def logsumexp(z: Tensor, dim: int = -1) -> Tensor:
    """Torch's derivative of it is rounded at the size of z, here at that of the differences."""
    largest = z.detach().amax(dim, keepdim=True) if z.shape[dim] else z.detach().sum(dim, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0)
    return largest.squeeze(dim) + (z - largest).logsumexp(dim)


def stats(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse, nll, entropy, prediction), the first three differentiable in the input and in probabilities."""
    z = transformed(input, softcap, logit_scale)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    if target.is_floating_point():
        q = target.movedim(class_dim(input), -1)
        nll = -(q * torch.where((q == 0) & ~log_p.isfinite(), 0, log_p)).sum(-1)
    else:
        live = target != ignore_index
        picked = log_p.gather(-1, torch.where(live, target, 0).unsqueeze(-1)).squeeze(-1)
        nll = torch.where(live, -picked, 0)
    entropy = -torch.where(p == 0, 0, p * torch.where(p == 0, 0, log_p)).sum(-1)
    return logsumexp(z), nll, entropy, z.argmax(-1)


def of_live_rows(stats: Any, target: Tensor, ignore_index: int = -100) -> Any:
    """CrossEntropyStats as linear_cross_entropy has them: those of ignored rows are 0, and -1 the prediction."""
    if target.is_floating_point():
        return stats
    live = target.long() != ignore_index
    *values, prediction = stats
    return type(stats)(*(torch.where(live, t, 0) for t in values), torch.where(live, prediction, -1))


# ---- inputs ----------------------------------------------------------------------------------------------------------


def make_target(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Class indices (the first row's is 0, the last row's C - 1) or probabilities for logits of this shape."""
    dim = 0 if len(shape) == 1 else 1
    if kind == "probabilities":
        return torch.randn(shape, dtype=torch.float64).softmax(dim).to(dtype)
    batch = (*shape[:dim], *shape[dim + 1 :])
    index_dtype = getattr(torch, kind)
    classes = min(shape[dim], torch.iinfo(index_dtype).max)
    target = torch.randint(0, classes, batch, dtype=index_dtype)
    if target.numel() > 1:
        target.view(-1)[0], target.view(-1)[-1] = 0, classes - 1
    return target


def as_computed(values: Tensor) -> Tensor:
    """The same memory as a tensor that some operation has computed, as logits are: neither a leaf nor a view."""
    source = values.detach().clone().requires_grad_()
    x = values.new_empty(0).set_(values.untyped_storage(), values.storage_offset(), values.shape, values.stride())
    return x.copy_(source)


def make_weight(classes: int, dtype: torch.dtype) -> Tensor:
    """Positive weights that every floating dtype can hold."""
    return (torch.rand(classes, dtype=torch.float64) + 0.25).bfloat16().to(dtype)


def gradient_roundings(dtype: torch.dtype, precompute_grad: bool, scaled: bool = False) -> int:
    """A precomputed gradient is rounded again if it is scaled afterwards; in float16 that is so for the mean too."""
    return 2 if precompute_grad and (scaled or dtype == torch.float16) else 1


def gradient_scale(
    grad: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    upstream: Tensor | float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    denominator: float | None = None,
    factors: Tensor | None = None,
    total_factors: Tensor | float = 1,
    **_: object,
) -> Tensor:
    """What errors of a gradient with respect to the logits are relative to.

    The largest gradient of the same row. Where the gradient A p - b has a b that is not one-hot, its largest
    value is added: both terms are rounded, and for a p near b, or a single class, the gradient is their difference.
    ``factors`` are those of the rows, ``total_factors`` what they are in the mean's denominator.
    """
    dim = class_dim(grad)
    y, w = double(target), double(weight)
    classes = grad.shape[dim]
    w = torch.ones(classes, dtype=torch.float64) if w is None else w
    mass = label_smoothing / max(classes, 1) * w
    if y.is_floating_point():
        mass = mass + (1 - label_smoothing) * w * y.movedim(dim, -1)
    rows = grad.movedim(dim, -1).shape[:-1]
    factor = torch.as_tensor(upstream, dtype=torch.float64).cpu().abs().expand(rows)
    if denominator is not None:
        factor = factor / abs(denominator)
    elif reduction == "mean":
        factor = factor / total_weight(y, w, dim, ignore_index, total_factors)
    if factors is not None:
        factor = factor * factors.abs()
    terms = (factor.unsqueeze(-1) * mass.abs()).movedim(-1, dim)
    of_row = largest(grad, dim)
    room = _room(of_row / factor.unsqueeze(dim), TOLERANCE["grad"][torch.float32])
    return of_row * room + largest(terms, dim).nan_to_num(0, 0, 0)


# ---- softmax ---------------------------------------------------------------------------------------------------------


def softmax(input: Tensor, dim: int, log: bool, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax or its logarithm, the gradient of the input) in float64."""
    x = double(input).requires_grad_()
    y = x.log_softmax(dim) if log else x.softmax(dim)
    y.backward(double(upstream))
    return y.detach(), x.grad


def softmax_tolerance(
    exact: Tensor, dim: int, log: bool, dtype: torch.dtype, arithmetic_dtype: torch.dtype | None = None
) -> Tensor:
    """Errors are relative to each value, and for probabilities grow with the rounded distance to the largest logit."""
    if log:
        return tolerance("log_softmax", exact, dtype, arithmetic_dtype=arithmetic_dtype)
    scale = exact * _distance(exact, dim)
    allowed = tolerance("softmax", exact, dtype, scale=scale, arithmetic_dtype=arithmetic_dtype)
    # Below the normal numbers the kernels' exponential is 0.
    return allowed + torch.finfo(arithmetic_dtype or arithmetic(dtype)).smallest_normal


def _distance(probabilities: Tensor, dim: int) -> Tensor:
    """1 + max z - z"""
    if probabilities.numel() == 0:
        return probabilities.clone()
    return 1 + (probabilities.amax(dim, keepdim=True) / probabilities).log().nan_to_num(0, 0, 0)


def softmax_grad_tolerance(
    exact: Tensor,
    exact_grad: Tensor,
    upstream: Tensor,
    dim: int,
    log: bool,
    dtype: torch.dtype,
    input_dtype: torch.dtype | None = None,
) -> Tensor:
    """Backward starts from the output as it was rounded to ``dtype``, in torch too; ``dtype`` is upstream's as well."""
    input_dtype = input_dtype or dtype
    g, u, work = double(upstream), roundoff(dtype), arithmetic(dtype, input_dtype)
    if log:
        sum_term = exact.exp() * g.sum(dim, keepdim=True).abs()
        # exp of an output that far off: z - max z is rounded, and then the output.
        off = ((roundoff(work) + u) * exact.abs().nan_to_num(0, 0, 0)).clamp(max=60) + underflow(dtype)
        from_output = torch.expm1(off) * sum_term
        scale = g.abs() + exact.exp() * g.abs().sum(dim, keepdim=True)
        quantity = "log_softmax_grad"
    else:
        each = (g * exact).abs()
        pull = g.abs() + each.sum(dim, keepdim=True)
        distance = _distance(exact, dim)
        scale = exact * (pull * distance + (each * distance).sum(dim, keepdim=True))
        from_output = 2 * u * exact * pull + underflow(dtype) * (pull + exact * g.abs().sum(dim, keepdim=True))
        quantity = "softmax_grad"
    return tolerance(quantity, exact_grad, input_dtype, scale=scale, arithmetic_dtype=work) + from_output
