"""The formulas of softmax cross entropy in plain torch, for any shape, dtype and transform.

They have three uses:

- In float64 the tests compare the kernels with them.
- Their second derivatives are the double backward and the forward-mode derivative of the kernels' gradient.
- Their first derivatives are the forward-mode derivative of the loss.

They hold several tensors of the logits' size. torch itself can differentiate them to any order.

For a row of logits x:  z = s tanh(a x / s) with the softcap s and the logit_scale a, or z = a x without a cap,
p = softmax(z),  lse = log sum exp z,  and
    loss = sum_c b_c (lse - z_c) + z_loss lse^2,    b_c = w_c ((1 - eps) q_c + eps / C),
where q is one-hot for a class index y. docs/math.md derives the formulas.

All results but lse depend only on differences of logits. So ``Rows.z`` is z minus its row's largest value, which counts
as a constant in every derivative. Sums and products with ``Rows.z`` are then not rounded at the size of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import internals
from .options import MEAN, NONE, Options


class RowGradients(NamedTuple):
    """One upstream gradient, or one derivative, for each row of the four differentiable results."""

    loss: Tensor
    lse: Tensor
    nll: Tensor
    entropy: Tensor


class Upstream(NamedTuple):
    """The upstream gradients of a call's results; that of the loss is for the reduced loss. None stands for 0."""

    loss: Tensor | None
    lse: Tensor | None
    nll: Tensor | None
    entropy: Tensor | None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product a * b, but 0 where a is 0 and b is infinite: no mass at a logit of -inf contributes nothing."""
    return a * torch.where((a == 0) & ~b.isfinite(), 0.0, b)


def _scaled(factor: float, x: Tensor) -> Tensor:
    """The product factor * x. With a factor of 0 its derivative is 0 too, even if the upstream gradient is infinite."""
    return factor * x if factor != 0 else torch.where(torch.zeros_like(x, dtype=torch.bool), x, factor * x.detach())


def _infinite_slope(x: Tensor, at: Tensor) -> Tensor:
    """A zero whose derivative in x is infinite where ``at``; ``at`` may be true only where x is 0.

    It is x * inf with 0 * inf = 0, both in the value and in the product of derivative and upstream gradient.
    """
    return torch.xlogy(torch.where(at, x, 0.0), torch.inf)


def _cost(mass: Tensor, surprise: Tensor) -> Tensor:
    """The product mass * surprise. A mass of 0 at an infinite surprise gives 0, with an infinite derivative in mass."""
    return _product(mass, surprise) + _infinite_slope(mass, (surprise == torch.inf) & (mass == 0))


def _weighted_cost(weights: Tensor, mass: Tensor, surprise: Tensor) -> Tensor:
    """The product weights * _cost(mass, surprise).

    At an infinite surprise the derivative in a factor that is 0 is infinite if the other factor is not 0.
    """
    massless = mass == 0
    zero, other = torch.where(massless, mass, weights), torch.where(massless, weights, mass)
    at = (surprise == torch.inf) & (zero == 0) & (other != 0)
    return _product(weights * mass, surprise) + torch.where(at, other, 0.0) * _infinite_slope(zero, at)


def is_live(target: Tensor, ignore_index: int) -> Tensor:
    """Bool of the target's shape: which rows are not ignored."""
    return target.long() != ignore_index  # in int64, because in uint8 -100 is class 156


def class_index(target: Tensor, live: Tensor, classes: int) -> Tensor:
    """The target as an index for ``gather`` and ``scatter``: int64, 0 for an ignored row.

    A class out of range raises there on the CPU. On CUDA it would destroy the context, so it is clamped into the range.
    """
    index = torch.where(live, target, 0).long()
    return index.clamp(0, max(classes - 1, 0)) if index.is_cuda else index


def shares(target: Tensor, weight: Tensor | None, ignore_index: int, row_weight: Tensor | None = None) -> Tensor:
    """The share of each row in the mean's denominator, for class indices; 0 (or False) for an ignored row.

    It is weight[target] or 1, times ``row_weight``.
    """
    live = is_live(target, ignore_index)
    share = live
    if weight is not None and weight.shape[0] != 0:
        share = weight.double()[class_index(target, live, weight.shape[0])]
    elif row_weight is None:
        return live
    if row_weight is not None:
        share = row_weight.double() * share
    return torch.where(live, share, 0.0)


def total_weight(target: Tensor, weight: Tensor | None, options: Options, row_weight: Tensor | None = None) -> Tensor:
    """The total weight of rows, float64: [], the mean's denominator, or [2], that and the factor of z_loss.

    The denominator is the sum of ``shares``; for probabilities that of row_weight, or the number of rows. The factor is
    there where the z terms have a denominator of their own, which has no class weights: the one over the other.
    """
    if target.is_floating_point():
        if row_weight is not None and target.shape[options.dim] != 0:
            return row_weight.sum(dtype=torch.float64)
        rows = target.numel() // max(target.shape[options.dim], 1)
        return torch.full((), float(rows), dtype=torch.float64, device=target.device)
    total = shares(target, weight, options.ignore_index, row_weight).sum(dtype=torch.float64)
    if not options.scales_z_loss(target, weight):
        return total
    of_rows = shares(target, None, options.ignore_index, row_weight).sum(dtype=torch.float64)
    nothing = (total == 0) & (of_rows == 0)  # no row counts, and none gets a NaN
    return torch.stack([total, torch.where(nothing, 0.0, total / of_rows)])


def divisor_of(total: Tensor) -> Tensor:
    """The mean's denominator, [], of a total weight."""
    return total[0] if total.dim() else total


def z_factor_of(total: Tensor) -> Tensor | None:
    """The factor of z_loss, [], of a total weight; None: 1."""
    return total[1] if total.dim() and total.shape[0] == 2 else None


def undivided(total: Tensor) -> Tensor | None:
    """The total weight with the denominator 1; None where that is all there is to it."""
    factor = z_factor_of(total)
    return None if factor is None else torch.stack([torch.ones_like(factor), factor])


def _tanh(u: Tensor) -> Tensor:
    """tanh(u), with derivatives that do not cancel where it is near 1 or -1, as torch's 1 - tanh² does.

    They are those of -2 sigmoid(-2 u), or of 2 sigmoid(2 u) where u is negative: but for a constant, both are tanh.
    """
    same_slope = torch.where(u > 0, -2 * torch.sigmoid(-2 * u), 2 * torch.sigmoid(2 * u))
    return torch.tanh(u.detach()) + (same_slope - same_slope.detach())


def _logits(x: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scaled and capped logits z, and the first two derivatives of z in x; None for a second derivative of 0."""
    cap, scale = options.softcap, options.logit_scale
    if cap is None:
        return scale * x, torch.full_like(x, scale), None
    u = x * (scale / cap)
    t = _tanh(u)
    slope = 4 * scale * torch.sigmoid(2 * u) * torch.sigmoid(-2 * u)  # 1 - tanh², which would cancel
    return cap * t, slope, -2 * t * slope * (scale / cap)


def _largest(z: Tensor) -> Tensor:
    """The largest value of each row, [..., 1], without a derivative; 0 if it is not finite."""
    if z.shape[-1] == 0:
        return z.new_zeros(*z.shape[:-1], 1)
    largest = z.detach().amax(-1, keepdim=True)
    return torch.where(largest.isfinite(), largest, 0.0)


def merged_state(max: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The state (max, rest) of rows from those of parts of their classes; both [parts, *batch].

    A row's sum of exponentials is exp(max) (1 + rest). Where all logits of a part are -inf, its max is -inf and its
    rest 0. A row without a finite maximum has the rest NaN.
    """
    first = max.argmax(0, keepdim=True)
    largest = max.gather(0, first)
    others = (1 + rest) * torch.where(max == -torch.inf, 0.0, (max - largest).exp())
    others = others.scatter(0, first, rest.gather(0, first))  # without the 1 of the largest logit
    state = others.sum(0)
    return largest.squeeze(0), torch.where(largest.squeeze(0).isfinite(), state, torch.nan)


class Rows:
    """One cross entropy and its derivatives.

    Its tensors have the classes in the last dimension; those with one value for each row have no such dimension.

    Args:
        input: logits, any floating dtype; half types are computed in float32.
        target: class indices (int64, uint8) of the input's shape without ``options.dim``, or probabilities of the
            input's shape.
        weight: [C] or None.
        options: the other arguments.
        row_weight: of the input's shape without ``options.dim``, or None: a factor of each row's loss, and a constant.
        total: the total weight. None where no result is reduced to a mean.
    """

    def __init__(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        row_weight: Tensor | None = None,
        total: Tensor | None = None,
    ) -> None:
        self.options = options
        self.dtype = input.dtype
        self.total = total
        double = torch.float64 in (input.dtype, target.dtype)
        arithmetic = torch.float64 if double else torch.float32
        factor = None if total is None else z_factor_of(total)
        self.z_loss = options.z_loss if factor is None else options.z_loss * factor.to(arithmetic)
        x = input.movedim(options.dim, -1).to(arithmetic)
        classes = x.shape[-1]
        if target.is_floating_point():
            self.live = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        else:
            self.live = is_live(target, options.ignore_index)
        if options.skips_ignored:
            x = torch.where(self.live.unsqueeze(-1), x, 0.0)
        z, self.slope, self.curvature = _logits(x, options)
        largest = _largest(z)
        self.z = z - largest
        self.log_p = internals.log_softmax(self.z, -1)
        self.p = self.log_p.exp()
        lse = largest.squeeze(-1) + self.z.logsumexp(-1)
        lse = torch.where(lse.isfinite(), lse, lse + torch.nan)  # as in the kernels: NaN without a distribution
        self.lse = self._unless_skipped(lse)

        weights = torch.ones(classes, dtype=arithmetic, device=x.device) if weight is None else weight.to(arithmetic)
        unsmoothed, share = 1 - options.label_smoothing, options.label_smoothing / max(classes, 1)
        if target.is_floating_point():
            self.y = target.movedim(options.dim, -1).to(arithmetic)
            self.mass = _scaled(unsmoothed, self.y) + share
        else:
            index = class_index(target, self.live, classes)
            one_hot = torch.zeros_like(x).scatter(-1, index.unsqueeze(-1)[..., :classes], 1.0)  # of 0 classes: nothing
            if index.is_cuda:  # as in the kernels, a class out of range makes its row NaN
                one_hot = torch.where((self.live & (index != target)).unsqueeze(-1), torch.nan, one_hot)
            self.y = one_hot * self.live.unsqueeze(-1)
            self.mass = (_scaled(unsmoothed, self.y) + share) * self.live.unsqueeze(-1)
        self.weights = weights
        self.class_weight = unsmoothed * weights
        self.b = weights * self.mass
        self.b_sum = self.b.sum(-1)
        self.mean = _product(self.p, self.z).sum(-1)  # E = sum p z
        self.row_weight = row_weight
        if options.weighs_by_probability:
            self.row_weight = (self.p * self.y).sum(-1).detach()
        elif row_weight is not None:
            self.row_weight = torch.where(self.live, row_weight.to(arithmetic), 0.0)

    def _unless_skipped(self, rows: Tensor) -> Tensor:
        """One value of each row; 0 for an ignored row that is skipped."""
        return torch.where(self.live, rows, 0.0) if self.options.skips_ignored else rows

    def _weighed(self, rows: Tensor) -> Tensor:
        """One value of each row, times its row_weight."""
        return rows if self.row_weight is None else _product(self.row_weight, rows)

    # ---- values, one per row ----

    def loss(self) -> Tensor:
        """The loss of each row; 0 for an ignored row."""
        surprise = -self.log_p
        if self.row_weight is not None:  # a factor of 0 makes nothing of an infinite one, in any derivative
            surprise = torch.where((self.row_weight == 0).unsqueeze(-1) & (surprise == torch.inf), 0.0, surprise)
        loss = _weighted_cost(self.weights, self.mass, surprise).sum(-1)
        if self.options.z_loss != 0:  # the square may overflow
            loss = loss + self.z_loss * self.lse.square()
        return torch.where(self.live, self._weighed(loss), 0.0)

    def nll(self) -> Tensor:
        """The difference lse - z_y, unweighted and unsmoothed; 0 for an ignored row."""
        return _cost(self.y, -self.log_p).sum(-1)

    def entropy(self) -> Tensor:
        """The entropy of the predicted distribution."""
        return self._unless_skipped(-_product(self.p, self.log_p).sum(-1))

    def prediction(self) -> Tensor:
        """The class of the largest logit."""
        largest = self.z.argmax(-1) if self.z.shape[-1] else torch.zeros_like(self.lse, dtype=torch.int64)
        return torch.where(self.live, largest, -1) if self.options.skips_ignored else largest

    # ---- first derivatives ----

    def _alpha(self, g: RowGradients) -> Tensor:
        pull = g.loss * (self.b_sum + 2 * self.z_loss * self.lse)
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
        """The gradient of the input, of the input's shape and dtype."""
        return self._restore(self.slope * self._gradient_z(g))

    def target_gradient(self, g: RowGradients) -> Tensor:
        """The gradient of probabilities, of the target's shape and the input's dtype."""
        return self._restore(_product(self._mass_gradient(g), -self.log_p))

    def derivative(self, dx: Tensor | None, dq: Tensor | None) -> RowGradients:
        """The derivatives of each row's results along dx in the input and dq in the probabilities."""
        u = self._along(dx, self.slope)
        t = self._along(dq, None)
        mean_u = (self.p * u).sum(-1)
        loss = self.b_sum * mean_u - (self.b * u).sum(-1) + 2 * self.z_loss * self.lse * mean_u
        loss = loss + _product(self.class_weight * t, -self.log_p).sum(-1)
        nll = self.y.sum(-1) * mean_u - (self.y * u).sum(-1) + _product(t, -self.log_p).sum(-1)
        centred = torch.where(self.p == 0, 0.0, self.z - self.mean.unsqueeze(-1))
        entropy = -(u * self.p * centred).sum(-1)
        return RowGradients(
            torch.where(self.live, self._weighed(loss), 0.0),
            self._unless_skipped(mean_u),
            torch.where(self.live, nll, 0.0),
            self._unless_skipped(entropy),
        )

    # ---- second derivatives ----

    def _along(self, d: Tensor | None, slope: Tensor | None) -> Tensor:
        if d is None:
            return torch.zeros_like(self.z)
        d = d.movedim(self.options.dim, -1).to(self.z.dtype)
        return d if slope is None else d * slope

    def gradient_derivative(self, g: RowGradients, dx: Tensor | None, dq: Tensor | None) -> Tensor:
        """The derivative of ``gradient(g)`` along dx and dq.

        In dx it is a symmetric form, so it is the double backward too.
        """
        u = self._along(dx, self.slope)
        mean_u = (self.p * u).sum(-1, keepdim=True)
        dp = self.p * (u - mean_u)
        z = torch.where(self.p == 0, 0.0, self.z)
        mean_change = (dp * z).sum(-1) + mean_u.squeeze(-1)
        alpha = self._alpha(g).unsqueeze(-1)
        beta = -g.entropy.unsqueeze(-1)
        alpha_change = 2 * self.z_loss * g.loss * mean_u.squeeze(-1) + g.entropy * mean_change
        out = dp * (alpha + beta * z) + self.p * (alpha_change.unsqueeze(-1) + beta * u)
        tau = self._mass_gradient(g) * self._along(dq, None)
        out = self.slope * (out + self.p * tau.sum(-1, keepdim=True) - tau)
        if self.curvature is not None:
            out = out + self.curvature * self._along(dx, None) * self._gradient_z(g)
        return self._restore(out)

    def target_gradient_derivative(self, g: RowGradients, dx: Tensor | None) -> Tensor:
        """The derivative of ``target_gradient(g)`` along dx."""
        u = self._along(dx, self.slope)
        return self._restore(self._mass_gradient(g) * ((self.p * u).sum(-1, keepdim=True) - u))

    # ---- reduction ----

    def _divided(self, values: Tensor) -> Tensor:
        """The values over the mean's denominator, if there is a mean."""
        if self.options.reduction != MEAN:
            return values
        assert self.total is not None
        return values / divisor_of(self.total).to(values.dtype)

    def row_gradients(self, upstream: Sequence[Tensor | None]) -> RowGradients:
        """The upstream gradients of each row, from those of the reduced loss and the statistics; None counts as 0.

        That of the loss is for the loss before it is multiplied by row_weight.
        """
        loss, lse, nll, entropy = upstream
        zero = torch.zeros_like(self.lse)
        if loss is not None:
            loss = self._divided(loss.to(zero.dtype))
        g = RowGradients(*(zero if t is None else zero + t.to(zero.dtype) for t in (loss, lse, nll, entropy)))
        loss = g.loss if self.row_weight is None else g.loss * self.row_weight
        return RowGradients(
            torch.where(self.live, loss, 0.0),
            self._unless_skipped(g.lse),
            torch.where(self.live, g.nll, 0.0),
            self._unless_skipped(g.entropy),
        )

    def reduce(self, rows: Tensor) -> Tensor:
        """The reduction of one value per row."""
        return rows if self.options.reduction == NONE else self._divided(rows.sum())

    def reduce_slope(self, rows: Tensor) -> Tensor:
        """The derivative of the reduced loss, from that of each row's loss.

        It is 0 if all rows are ignored, as the gradients are.
        """
        reduced = self.reduce(rows)
        return torch.where(self.live.any(), reduced, 0.0) if self.options.reduction == MEAN else reduced


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    options: Options,
    dtype: torch.dtype | None,
    stats: bool,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(loss,) or, with ``stats``, (loss, lse, nll, entropy, prediction), differentiable to any order, in weight too."""
    if dtype == torch.float64:
        input = input.double()
    # A copy, because backward divides by what it was.
    total = None if denominator is None else denominator.clone()
    if total is None:
        total = total_weight(target, weight, options, row_weight)
    rows = Rows(input, target, weight, options, row_weight, total)
    loss = rows.reduce(rows.loss()).to(dtype or input.dtype)
    if not stats:
        return (loss,)
    # A copy, because the loss may be computed from rows.lse: a caller's hook or in-place change must not reach that.
    return loss, rows.lse.clone(), rows.nll(), rows.entropy(), rows.prediction()
