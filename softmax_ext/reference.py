"""The formulas of softmax cross entropy in plain torch, for any shape, dtype and transform.

Three uses: in float64 they are what the tests compare with; their second derivatives are the double backward and the
forward-mode derivative of the kernels' gradient; and their first are the forward-mode derivative of the loss. They hold
several tensors of the logits' size and are differentiable to any order by torch itself. docs/math.md derives them.

For a row of logits x:  z = s tanh(a x / s) with the softcap s and the logit_scale a, or z = a x without a cap,
p = softmax(z),  lse = log sum exp z,  and
    loss = sum_c b_c (lse - z_c) + z_loss lse^2,    b_c = w_c ((1 - eps) q_c + eps / C),
where q is one-hot for a class index y and the first w_c is then w_y.

All but lse depends on differences of logits alone. So z is held less its row's largest value, a constant to every
derivative: what is subtracted from or multiplied by z is then not rounded at the size of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .options import MEAN, NONE, Options


class RowGradients(NamedTuple):
    """One upstream gradient, or one derivative, for each row of the four differentiable results."""

    loss: Tensor
    lse: Tensor
    nll: Tensor
    entropy: Tensor


class Upstream(NamedTuple):
    """The gradients of what a call returns: those of the rows, or of the reduced loss; None: 0."""

    loss: Tensor | None
    lse: Tensor | None
    nll: Tensor | None
    entropy: Tensor | None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A * b, with 0 where a is 0 and b infinite: a class without mass contributes nothing at a logit of -inf."""
    return a * torch.where((a == 0) & ~b.isfinite(), 0.0, b)


def _scaled(factor: float, x: Tensor) -> Tensor:
    """Factor * x; a factor of 0 makes the derivative 0 too, where what it is multiplied by is infinite."""
    return factor * x if factor != 0 else torch.where(torch.zeros_like(x, dtype=torch.bool), x, factor * x.detach())


def _infinite_slope(x: Tensor, at: Tensor) -> Tensor:
    """0, whose derivative in x is infinite where ``at``, which must be only where x is 0.

    That is x * inf with 0 * inf = 0, in the value and in what the derivative is multiplied by.
    """
    return torch.xlogy(torch.where(at, x, 0.0), torch.inf)


def _cost(mass: Tensor, surprise: Tensor) -> Tensor:
    """Mass * surprise, and 0 for a mass of 0 at an infinite surprise, whose derivative in the mass is infinite."""
    return _product(mass, surprise) + _infinite_slope(mass, (surprise == torch.inf) & (mass == 0))


def _weighted_cost(weights: Tensor, mass: Tensor, surprise: Tensor) -> Tensor:
    """Weights * _cost, with an infinite derivative in the one factor that is 0, and none where both are."""
    massless = mass == 0
    zero, other = torch.where(massless, mass, weights), torch.where(massless, weights, mass)
    at = (surprise == torch.inf) & (zero == 0) & (other != 0)
    return _product(weights * mass, surprise) + torch.where(at, other, 0.0) * _infinite_slope(zero, at)


def is_live(target: Tensor, ignore_index: int) -> Tensor:
    """Which rows are not ignored. In int64: as uint8, -100 would be class 156."""
    return target.long() != ignore_index


def class_index(target: Tensor, live: Tensor, classes: int) -> Tensor:
    """An index for ``gather`` and the like: 0 where ignored. A class out of range stays, which they refuse on the CPU.

    On CUDA they would take the context down with them, so it becomes one in range there.
    """
    index = torch.where(live, target, 0).long()
    return index.clamp(0, max(classes - 1, 0)) if index.is_cuda else index


def row_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What each row counts in the mean's denominator: weight[target], or without weights whether it is live."""
    live = is_live(target, ignore_index)
    if weight is None or weight.shape[0] == 0:
        return live
    picked = weight.double()[class_index(target, live, weight.shape[0])]
    return torch.where(live, picked, 0.0)


def total_weight(target: Tensor, weight: Tensor | None, dim: int, ignore_index: int) -> Tensor:
    """The mean's denominator, float64: the sum of weight[target] over rows not ignored; rows, for probabilities."""
    if target.is_floating_point():
        rows = target.numel() // max(target.shape[dim], 1)
        return torch.full((), float(rows), dtype=torch.float64, device=target.device)
    return row_weights(target, weight, ignore_index).sum(dtype=torch.float64)


def _logits(x: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Z of x, and its first two derivatives; the second is None where it is 0."""
    cap, scale = options.softcap, options.logit_scale
    if cap is None:
        return scale * x, torch.full_like(x, scale), None
    t = torch.tanh(x * (scale / cap))
    slope = scale * (1 - t * t)
    return cap * t, slope, -2 * t * slope * (scale / cap)


def _largest(z: Tensor) -> Tensor:
    """Of each row, [..., 1]; 0 where that is not finite. No derivative passes through it."""
    if z.shape[-1] == 0:
        return z.new_zeros(*z.shape[:-1], 1)
    largest = z.detach().amax(-1, keepdim=True)
    return torch.where(largest.isfinite(), largest, 0.0)


class Rows:
    """One cross entropy with the classes in the last dimension, and its derivatives.

    Args:
        input: logits, any floating dtype; half types are computed in float32.
        target: classes (int64, uint8) of the input's shape without ``options.dim``, or probabilities of its shape.
        weight: [C] or None.
        options: the rest.
    """

    def __init__(self, input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> None:
        self.options = options
        self.dtype = input.dtype
        double = torch.float64 in (input.dtype, target.dtype)
        arithmetic = torch.float64 if double else torch.float32
        x = input.movedim(options.dim, -1).to(arithmetic)
        classes = x.shape[-1]
        z, self.slope, self.curvature = _logits(x, options)
        largest = _largest(z)
        self.z = z - largest
        self.log_p = self.z.log_softmax(-1)
        self.p = self.log_p.exp()
        lse = largest.squeeze(-1) + self.z.logsumexp(-1)
        self.lse = torch.where(lse.isfinite(), lse, lse + torch.nan)  # as the kernels': NaN without a distribution

        weights = torch.ones(classes, dtype=arithmetic, device=x.device) if weight is None else weight.to(arithmetic)
        unsmoothed, share = 1 - options.label_smoothing, options.label_smoothing / max(classes, 1)
        if target.is_floating_point():
            self.live = torch.ones_like(self.lse, dtype=torch.bool)
            self.y = target.movedim(options.dim, -1).to(arithmetic)
            self.mass = _scaled(unsmoothed, self.y) + share
        else:
            self.live = is_live(target, options.ignore_index)
            index = class_index(target, self.live, classes)
            one_hot = torch.zeros_like(x).scatter(-1, index.unsqueeze(-1)[..., :classes], 1.0)  # of 0 classes: nothing
            if index.is_cuda:  # as the kernels: a class out of range makes its row NaN
                one_hot = torch.where((self.live & (index != target)).unsqueeze(-1), torch.nan, one_hot)
            self.y = one_hot * self.live.unsqueeze(-1)
            self.mass = (_scaled(unsmoothed, self.y) + share) * self.live.unsqueeze(-1)
        self.weights = weights
        self.class_weight = unsmoothed * weights
        self.b = weights * self.mass
        self.b_sum = self.b.sum(-1)
        self.mean = _product(self.p, self.z).sum(-1)  # E = sum p z

    # ---- values, one per row ----

    def loss(self) -> Tensor:
        """Unreduced; 0 for an ignored row."""
        loss = _weighted_cost(self.weights, self.mass, -self.log_p).sum(-1)
        if self.options.z_loss != 0:  # the square may overflow
            loss = loss + self.options.z_loss * self.lse.square()
        return torch.where(self.live, loss, 0.0)

    def nll(self) -> Tensor:
        """Lse - z_y, unweighted and unsmoothed; 0 for an ignored row."""
        return _cost(self.y, -self.log_p).sum(-1)

    def entropy(self) -> Tensor:
        """Of the predicted distribution."""
        return -_product(self.p, self.log_p).sum(-1)

    # ---- first derivatives ----

    def _alpha(self, g: RowGradients) -> Tensor:
        pull = g.loss * (self.b_sum + 2 * self.options.z_loss * self.lse)
        return pull + g.lse + g.nll * self.y.sum(-1) + g.entropy * self.mean

    def _gradient_z(self, g: RowGradients) -> Tensor:
        pull = self._alpha(g).unsqueeze(-1) - g.entropy.unsqueeze(-1) * self.z
        return _product(self.p, pull) - g.loss.unsqueeze(-1) * self.b - g.nll.unsqueeze(-1) * self.y

    def _mass_gradient(self, g: RowGradients) -> Tensor:
        """G such that dL/dq_c = G_c (lse - z_c)."""
        return g.loss.unsqueeze(-1) * self.class_weight + g.nll.unsqueeze(-1)

    def _restore(self, classes_last: Tensor) -> Tensor:
        return classes_last.movedim(-1, self.options.dim).to(self.dtype)

    def gradient(self, g: RowGradients) -> Tensor:
        """DL/dinput, of the input's shape and dtype."""
        return self._restore(self.slope * self._gradient_z(g))

    def target_gradient(self, g: RowGradients) -> Tensor:
        """DL/dtarget for a target of probabilities."""
        return self._restore(_product(self._mass_gradient(g), -self.log_p))

    def derivative(self, dx: Tensor | None, dq: Tensor | None) -> RowGradients:
        """Of (loss, lse, nll, entropy) along dx in the input and dq in the probabilities, one value per row."""
        u = self._along(dx, self.slope)
        t = self._along(dq, None)
        mean_u = (self.p * u).sum(-1)
        loss = self.b_sum * mean_u - (self.b * u).sum(-1) + 2 * self.options.z_loss * self.lse * mean_u
        loss = loss + _product(self.class_weight * t, -self.log_p).sum(-1)
        nll = self.y.sum(-1) * mean_u - (self.y * u).sum(-1) + _product(t, -self.log_p).sum(-1)
        centred = torch.where(self.p == 0, 0.0, self.z - self.mean.unsqueeze(-1))
        entropy = -(u * self.p * centred).sum(-1)
        return RowGradients(torch.where(self.live, loss, 0.0), mean_u, torch.where(self.live, nll, 0.0), entropy)

    # ---- second derivatives ----

    def _along(self, d: Tensor | None, slope: Tensor | None) -> Tensor:
        if d is None:
            return torch.zeros_like(self.z)
        d = d.movedim(self.options.dim, -1).to(self.z.dtype)
        return d if slope is None else d * slope

    def gradient_derivative(self, g: RowGradients, dx: Tensor | None, dq: Tensor | None) -> Tensor:
        """Of ``gradient(g)`` along dx and dq. In dx it is a symmetric form, so it is the double backward as well."""
        u = self._along(dx, self.slope)
        mean_u = (self.p * u).sum(-1, keepdim=True)
        dp = self.p * (u - mean_u)
        z = torch.where(self.p == 0, 0.0, self.z)
        mean_change = (dp * z).sum(-1) + mean_u.squeeze(-1)
        alpha = self._alpha(g).unsqueeze(-1)
        beta = -g.entropy.unsqueeze(-1)
        alpha_change = 2 * self.options.z_loss * g.loss * mean_u.squeeze(-1) + g.entropy * mean_change
        out = dp * (alpha + beta * z) + self.p * (alpha_change.unsqueeze(-1) + beta * u)
        tau = self._mass_gradient(g) * self._along(dq, None)
        out = self.slope * (out + self.p * tau.sum(-1, keepdim=True) - tau)
        if self.curvature is not None:
            out = out + self.curvature * self._along(dx, None) * self._gradient_z(g)
        return self._restore(out)

    def target_gradient_derivative(self, g: RowGradients, dx: Tensor | None) -> Tensor:
        """Of ``target_gradient(g)`` along dx."""
        u = self._along(dx, self.slope)
        return self._restore(self._mass_gradient(g) * ((self.p * u).sum(-1, keepdim=True) - u))

    # ---- reduction ----

    def row_gradients(
        self,
        upstream: Sequence[Tensor | None],
        total_weight: Tensor,
    ) -> RowGradients:
        """Upstream gradients of the reduced loss and of the statistics, per row; None counts as 0."""
        loss, lse, nll, entropy = upstream
        zero = torch.zeros_like(self.lse)
        if loss is not None and self.options.reduction == MEAN:
            loss = loss.to(zero.dtype) / total_weight.to(zero.dtype)
        g = RowGradients(*(zero if t is None else zero + t.to(zero.dtype) for t in (loss, lse, nll, entropy)))
        return g._replace(loss=torch.where(self.live, g.loss, 0.0), nll=torch.where(self.live, g.nll, 0.0))

    def reduce(self, rows: Tensor, total_weight: Tensor) -> Tensor:
        """The reduction of one value per row."""
        if self.options.reduction == NONE:
            return rows
        reduced = rows.sum()
        return reduced / total_weight.to(rows.dtype) if self.options.reduction == MEAN else reduced

    def reduce_slope(self, rows: Tensor, total_weight: Tensor) -> Tensor:
        """A derivative of the reduced loss, from that of each row; 0 where no row counts, as the gradients are."""
        reduced = self.reduce(rows, total_weight)
        return torch.where(self.live.any(), reduced, 0.0) if self.options.reduction == MEAN else reduced


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options, dtype: torch.dtype | None, stats: bool
) -> tuple[Tensor, ...]:
    """(loss,) or, with ``stats``, (loss, lse, nll, entropy, prediction), differentiable to any order, in weight too."""
    if dtype == torch.float64:
        input = input.double()
    rows = Rows(input, target, weight, options)
    total = total_weight(target, weight, options.dim, options.ignore_index)
    loss = rows.reduce(rows.loss(), total).to(dtype or input.dtype)
    if not stats:
        return (loss,)
    prediction = rows.z.argmax(-1) if rows.z.shape[-1] else torch.zeros_like(rows.lse, dtype=torch.int64)
    # A copy: the loss may be computed from rows.lse, whose hooks and changes in place are not the caller's.
    return loss, rows.lse.clone(), rows.nll(), rows.entropy(), prediction
