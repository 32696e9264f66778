"""What results are compared with, and how far they may be from it: the float64 oracle and the one table of tolerances.

The oracle gets float64 copies of the same, already rounded, inputs: torch's own functions, and softmax_ext.reference
for the options that torch lacks. An error is judged value by value:

    |actual - exact|  <=  roundings * u(dtype of the result) * |exact|  +  TOLERANCE * u(dtype of the arithmetic) * scale

u is the unit roundoff. The first term is the rounding of a right result, once. The second is the error of the
arithmetic, float32 for the half types as well: a sum that is kept in bfloat16 misses it by a factor of 65536 / TOLERANCE.
``scale`` is the magnitude that the error is relative to: the value's own for losses, the largest gradient of the same
row for gradients. That is stricter than "no worse than torch, plus rounding"; where a test has to allow what torch's
own arithmetic loses on the same input, it passes torch's result as ``theirs``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_ext import reference
from softmax_ext.ops import MEAN, NONE, SUM
from softmax_ext.reference import Options

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]

# In units of roundoff of the arithmetic. In float64 the oracle, which subtracts logits from their log-sum-exp, is itself
# no more exact than this.
TOLERANCE = {
    "loss": {torch.float64: 1024, torch.float32: 8},
    "grad": {torch.float64: 64, torch.float32: 8},
    "grad_target": {torch.float64: 64, torch.float32: 8},
    "lse": {torch.float64: 8, torch.float32: 4},
    "nll": {torch.float64: 1024, torch.float32: 8},
    "entropy": {torch.float64: 64, torch.float32: 8},
    "softmax": {torch.float64: 64, torch.float32: 8},
    "log_softmax": {torch.float64: 64, torch.float32: 8},
    "softmax_grad": {torch.float64: 64, torch.float32: 8},
    "log_softmax_grad": {torch.float64: 64, torch.float32: 8},
    "exp": {torch.float32: 2},
}


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def underflow(dtype: torch.dtype) -> float:
    """The largest absolute error of rounding to nearest where numbers are subnormal."""
    return torch.finfo(dtype).smallest_normal * roundoff(dtype)


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
    allowed = TOLERANCE[quantity][work] * roundoff(work) * scale.abs().nan_to_num(0, 0, 0)
    return allowed + roundings * roundoff(dtype) * exact.abs().nan_to_num(0, 0, 0) + roundings * underflow(dtype)


def far_off(actual: Tensor, exact: Tensor, allowed: Tensor) -> Tensor:
    """Where the error is larger than allowed, or where one is NaN or infinite and the other is something else."""
    actual = actual.detach().to("cpu", torch.float64)
    special = ~exact.isfinite() | ~actual.isfinite()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    return torch.where(special, ~same, (actual - exact).abs() > allowed)


def assert_within(actual: Tensor, exact: Tensor, allowed: Tensor, what: object, theirs: Tensor | None = None) -> None:
    """Every value within its own bound; with ``theirs``, or with no error larger than torch's largest."""
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)} instead of {list(exact.shape)}"
    if theirs is not None and theirs.numel():
        worst = (theirs.detach().to("cpu", torch.float64) - exact).abs().nan_to_num(0, 0, 0).max()
        allowed = allowed.clamp(min=worst)
    bad = far_off(actual, exact, allowed)
    if not bad.any():
        return
    error = (actual.detach().to("cpu", torch.float64) - exact).abs()
    worst_first = (error / allowed).nan_to_num(float("inf")).where(bad, torch.tensor(-1.0))
    at = tuple(int(i) for i in torch.unravel_index(worst_first.argmax(), exact.shape))
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


def class_dim(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def double(tensor: Tensor | None) -> Tensor | None:
    """A float64 copy on the CPU; class indices become int64."""
    if tensor is None:
        return None
    return tensor.detach().cpu().to(torch.float64 if tensor.is_floating_point() else torch.int64).clone()


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
) -> Tensor:
    """By torch where it has the options, else by the reference formulas. Differentiable."""
    if z_loss == 0 and softcap is None and logit_scale == 1:
        return F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    code = {"none": NONE, "mean": MEAN, "sum": SUM}[reduction]
    dim = class_dim(input)
    options = Options(dim, code, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return reference.cross_entropy(input, target, weight, options)


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, upstream: Tensor | float = 1.0, **options: object
) -> Exact:
    x, y, w = double(input), double(target), double(weight)
    x.requires_grad_()
    y.requires_grad_(y.is_floating_point())
    loss = cross_entropy_loss(x, y, w, **options)
    loss.backward(torch.as_tensor(upstream, dtype=torch.float64).cpu().expand_as(loss))
    return Exact(loss.detach(), x.grad, y.grad)


def stats(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse, nll, entropy, prediction), the first three differentiable in a float64 input."""
    z = input.movedim(class_dim(input), -1)
    z = logit_scale * z if softcap is None else softcap * torch.tanh(logit_scale * z / softcap)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    if target.is_floating_point():
        nll = -torch.where(target.movedim(class_dim(input), -1) == 0, 0, target.movedim(class_dim(input), -1) * log_p).sum(-1)
    else:
        live = target != ignore_index
        picked = log_p.gather(-1, torch.where(live, target, 0).unsqueeze(-1)).squeeze(-1)
        nll = torch.where(live, -picked, 0)
    entropy = -torch.where(p == 0, 0, p * torch.where(p == 0, 0, log_p)).sum(-1)
    return z.logsumexp(-1), nll, entropy, z.argmax(-1)


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


def make_weight(classes: int, dtype: torch.dtype) -> Tensor:
    """Positive weights that every floating dtype can hold."""
    return (torch.rand(classes, dtype=torch.float64) + 0.25).bfloat16().to(dtype)


def gradient_scale(grad: Tensor, target: Tensor, dim: int) -> Tensor:
    """What errors of a gradient with respect to the logits are relative to: the largest gradient of the same row."""
    return largest(grad, dim)
