"""How far off a drawn call may be from the oracle: an error analysis of each row.

Two differences to torch are meant (README): an ignored row has loss and gradient 0 whatever its logits, and a class
without mass contributes nothing at a logit of -inf. Where torch multiplies 0 by infinity there, the oracle's operands
are replaced first.

A bound is  TOLERANCE u (sum of the magnitudes of what is added up)  in the arithmetic's u, as in oracle.py, where the
magnitude of a log-probability is what its rounding is relative to; plus the roundings to the result's dtype; plus
what float64 itself may be off. Where a row leaves the range of the arithmetic anything is accepted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT64 = oracle.SAME_ARITHMETIC * oracle.roundoff(torch.float64)


class Bounded(NamedTuple):
    exact: Tensor
    allowed: Tensor  # inf: anything goes


def finite(t: Tensor) -> Tensor:
    """For magnitudes: what is not finite has no rounding error."""
    return t.nan_to_num(0, 0, 0)


def assert_bounded(actual: Tensor, bounded: Bounded, dtype: torch.dtype, what: object) -> None:
    """Within the bound; a value beyond the largest of the dtype may be infinite."""
    exact, allowed = bounded
    ours = actual.detach().to("cpu", torch.float64)
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)} instead of {list(exact.shape)}"
    largest = torch.finfo(dtype).max
    rounds_to_infinity = (
        exact.isfinite() & (exact.abs() + allowed >= largest) & (ours.isinf() | (ours.abs() >= largest))
    )
    anything = allowed.isinf() | (rounds_to_infinity & (ours.sign() == exact.sign()))
    oracle.assert_within(torch.where(anything, exact, ours), exact, allowed.nan_to_num(0, 0, 0), what)


class Rows:
    """The rows of one cross entropy: [M, C] in float64, and the magnitudes that errors are relative to.

    Args:
        logits: as F.cross_entropy takes them, float64; of a linear layer, what its operands give.
        target, weight: float64 or int64.
        options: of LossCase.options().
        work: the dtype of the arithmetic.
        logit_error: how far off each logit is when the kernel reads it.
        plain: by reference.py, in torch's operations: off by a unit of 1.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: dict[str, Any],
        work: torch.dtype,
        logit_error: Tensor | None = None,
        plain: bool = False,
    ) -> None:
        self.dim, self.work, self.options, self.plain = oracle.class_dim(logits), work, options, plain
        self.unit = oracle.TOLERANCE["loss"][work] * oracle.roundoff(work)
        classes = logits.shape[self.dim]
        x = self.flat(logits.detach())
        self.scale, self.cap = abs(options["logit_scale"]), options["softcap"]
        z = oracle.transformed(logits.detach(), self.cap, options["logit_scale"])
        self.slope = self.slope_error = torch.full_like(x, self.scale)
        if self.cap:  # exp(-2 |u|), which the formulas compute from a rounded u
            u = finite(x).abs() * (self.scale / self.cap)
            self.slope = self.scale / u.cosh().square()
            self.slope_error = self.slope * (4 + 4 * u)
        changed = self.cap is not None or options["logit_scale"] != 1
        off = finite(z).abs().amax(-1, keepdim=True) if changed else torch.zeros(*x.shape[:-1], 1, dtype=torch.float64)
        if logit_error is not None:
            if self.cap:  # the slope is that of a logit which is off
                turn = 2 * self.slope * finite(z / self.cap).abs() * (self.scale / self.cap)
                self.slope_error = self.slope_error + turn * self.flat(logit_error) / self.unit
            error = (self.flat(logit_error) * self.slope).amax(-1, keepdim=True)
            off = off + error / self.unit
            self.inflation = (2 * error).clamp(max=60).exp()
        else:
            self.inflation = torch.ones_like(off)

        self.off = off
        m = z.amax(-1, keepdim=True)
        distance = m - z
        first = F.one_hot(torch.where(z.isnan(), -torch.inf, z).argmax(-1), classes).bool()
        e = torch.where(first, 0, (-distance).exp())
        log_sum = e.sum(-1, keepdim=True).log1p()
        self.log_p = -(distance + log_sum)
        self.p = finite(self.log_p.exp())
        d, self.m = finite(distance), finite(m)
        others = torch.where(first, 0, self.p * (1 + d + 2 * off)).sum(-1, keepdim=True)
        self.log_sum_error = finite(log_sum) + others + (1 if plain else 0)  # of log_sum, in units
        self.lse = m + log_sum
        self.lse_error = self.m.abs() + self.log_sum_error + off
        self.e = (self.log_sum_error + d + 2 * torch.where(d > 0, off, 0)) * self.inflation  # of -log p
        self.e_p = self.p * (1 + self.log_sum_error + d + 2 * off) * self.inflation  # of p
        self.minus_log_p = finite(-self.log_p)
        self.sick = ~(log_sum + m).isfinite()  # all -inf, a +inf or a NaN: no distribution

        weights = torch.ones(classes, dtype=torch.float64) if weight is None else weight
        kept, share = 1 - options["label_smoothing"], options["label_smoothing"] / max(classes, 1)
        if target.is_floating_point():
            self.q = self.flat(target)
            self.live = torch.ones(*x.shape[:-1], 1, dtype=torch.bool)
            self.one_hot = torch.zeros_like(self.q)
        else:
            y = target.reshape(x.shape[:-1])
            self.live = (y != options["ignore_index"]).unsqueeze(-1)
            self.one_hot = F.one_hot(torch.where(self.live.squeeze(-1), y, 0), classes).double() * self.live
            self.q = self.one_hot
        self.target_weight = kept * weights
        self.mass = (self.target_weight * self.q + share * weights) * self.live
        self.smooth_mass = torch.where(self.one_hot > 0, share * weights, self.mass).abs()  # without the target class's
        self.true_mass = (self.target_weight * self.one_hot).abs()
        each = self.live.double() if target.is_floating_point() else self.one_hot * weights
        self._weigh(options["row_weight"])
        if not isinstance(options["row_weight"], str):
            each = each * self.row_weight
        self.total = self.total_of_z_terms = each.sum()
        if not target.is_floating_point():
            factors = self.live if isinstance(options["row_weight"], str) else self.row_weight
            self.total_of_z_terms = factors.double().sum()
        if options["denominator"] is not None:
            self.options = {**options, "reduction": "mean"}
            self.total = self.total_of_z_terms = torch.tensor(options["denominator"], dtype=torch.float64)
        is_mean = self.options["reduction"] == "mean"
        self.no_weight = bool(is_mean and self.total * self.total_of_z_terms == 0 and self.live.any())
        # So that z_loss times it can be divided by the total, with the rest of a row's loss.
        self.z_factor = finite(self.total / self.total_of_z_terms) if is_mean else 1.0
        self.z_loss = options["z_loss"] * abs(self.z_factor)
        self.massless = self.unflat((z == -torch.inf) & ((self.mass == 0) | (self.row_weight == 0)) & m.isfinite())
        self.dead = self.unflat((~self.live).expand_as(x))
        self.shape = x.shape[:-1]

        limit = torch.finfo(work).max / 16
        lse2 = self.z_loss * self.lse_error.square() if options["z_loss"] else torch.zeros_like(m)
        sizes = [finite(z).abs(), d, self.minus_log_p * self.mass.abs(), lse2.expand_as(d)]
        sizes += [finite(x * self.scale).abs()]
        big = torch.stack(sizes).amax(0) if classes else torch.zeros_like(d)
        # -inf and inf are exact; what becomes infinite on the way is not.
        self.lost = (big.sum(-1, keepdim=True) > limit) if classes else torch.zeros_like(self.live)

    def _weigh(self, row_weight: Tensor | str | None) -> None:
        """What each row's loss is multiplied by, [M, 1], and its relative error, in units."""
        self.row_weight, self.row_weight_error = self.live.double(), torch.zeros_like(self.m)
        if isinstance(row_weight, str):
            self.row_weight = (self.one_hot * self.p).sum(-1, keepdim=True)
            relative = (1 + self.log_sum_error + finite(self.minus_log_p) + 2 * self.off) * self.inflation
            self.row_weight_error = (self.one_hot * relative).sum(-1, keepdim=True)
        elif row_weight is not None:
            self.row_weight = torch.where(self.live, row_weight.reshape(self.live.shape), 0)

    def of_live(self, values: Tensor) -> Tensor:
        """Values of the rows, 0 where they are ignored."""
        return torch.where(self.live.squeeze(-1), values, 0)

    def flat(self, t: Tensor) -> Tensor:
        return t.movedim(self.dim, -1)

    def unflat(self, t: Tensor) -> Tensor:
        return t.movedim(-1, self.dim)

    def _allow(self, magnitude: Tensor, float64: Tensor) -> Tensor:
        """A bound of results from their magnitude, and from that of what float64 adds up."""
        tiny = torch.finfo(self.work).smallest_normal * 64
        allowed = self.unit * finite(magnitude) + FLOAT64 * finite(float64) + tiny * (1 + finite(float64))
        no_mass = (self.mass == 0).all(-1, keepdim=True) | (self.row_weight == 0)
        nothing = self.sick & no_mass & self.live  # 0 or NaN
        return torch.where(self.lost | nothing, torch.inf, allowed)

    # ---- values ----

    def loss_bound(self) -> Tensor:
        """Of each row's loss, [M, 1]."""
        z_loss = self.z_loss
        size = (self.smooth_mass * self.e + self.true_mass * self.e).sum(-1, keepdim=True)
        square = finite(self.lse).square()
        size = size + z_loss * (2 * finite(self.lse).abs() * self.lse_error + square) * self.live
        mass = self.mass.abs()
        naive = (mass * (1 + self.minus_log_p)).sum(-1, keepdim=True) + z_loss * square
        size = size + self.row_weight_error * naive
        return self._allow(size * self.row_weight.abs(), naive * self.row_weight.abs())

    def reduced(self, exact: Tensor, dtype: torch.dtype) -> Bounded:
        """Of the loss, as the reduction makes it."""
        rows = self.loss_bound().squeeze(-1)
        if self.options["reduction"] == "none":
            allowed = rows
        else:
            allowed = rows.sum()
            if self.options["reduction"] == "mean":
                allowed = finite(allowed / self.total.abs()) if not allowed.isinf() else allowed
            allowed = allowed + 2 * FLOAT64 * finite(exact).abs()
        rounding = (oracle.roundoff(dtype) * finite(exact).abs()) + oracle.underflow(dtype)
        return Bounded(exact, allowed + rounding)

    def stats(self, exact: list[Tensor], dtype: torch.dtype) -> list[Bounded]:
        """Of lse, nll and entropy; all are NaN of a row that has no distribution, where logsumexp is infinite."""
        exact = [
            torch.where(self.sick.squeeze(-1) & ~right.isnan() & (i == 0), torch.nan, right)
            for i, right in enumerate(exact)
        ]
        q = self.q.abs()
        p, e, mlp = self.p, self.e, self.minus_log_p
        sizes = [
            self.lse_error + finite(self.lse).abs(),
            (q * e).sum(-1, keepdim=True),
            ((p + self.e_p * self.unit) * e + self.e_p * mlp).sum(-1, keepdim=True),
        ]
        naive = [1 + self.lse_error, (q * (1 + mlp)).sum(-1, keepdim=True), 1 + self.log_sum_error]
        bounds = []
        for right, size, naively in zip(exact, sizes, naive, strict=True):
            allowed = self._allow(size, naively).squeeze(-1)
            bounds.append(Bounded(right, allowed + oracle.roundoff(dtype) * finite(right).abs()))
        return bounds

    # ---- gradients ----

    def factor(self, upstream: Tensor | None) -> Tensor:
        """What each row's gradient is multiplied by, [M, 1]."""
        if upstream is None:
            return torch.zeros_like(self.m)
        f = upstream.abs().unsqueeze(-1) if upstream.dim() else upstream.abs().expand_as(self.m)
        if self.options["reduction"] == "mean":
            f = f / self.total.abs()
        return finite(f) * self.row_weight.abs()

    def gradient_error(self, exact: Tensor, upstream: list[Tensor | None]) -> Tensor:
        """Of the gradient of each logit, before it is rounded to its dtype; in the logits' shape.

        As everywhere in these tests errors are relative to the largest of the row; of a single class of the target it
        is -(1 - p_y), the sum of the others, that counts and not 1.
        """
        loss, *stats = upstream
        f = self.factor(loss)
        g_lse, g_nll, g_entropy = (torch.zeros_like(self.m) if g is None else g.abs().unsqueeze(-1) for g in stats)
        z_pull = 2 * self.z_loss * f
        q = torch.where(self.one_hot > 0, 0, self.q.abs())
        of_lse = (z_pull * (finite(self.lse).abs() + self.lse_error)).nan_to_num(0)
        pull = f * self.mass.abs().sum(-1, keepdim=True) + of_lse + g_lse
        pull = pull + g_nll * self.q.abs().sum(-1, keepdim=True)
        entropy = (self.p * (1 + self.minus_log_p)).sum(-1, keepdim=True)
        entropy_error = ((self.p + self.unit * self.e_p) * self.e + self.e_p * (1 + self.minus_log_p)).sum(
            -1, keepdim=True
        )
        of_target = f * self.true_mass + g_nll * self.one_hot
        size = self.e_p * (pull - of_target + g_entropy * (self.minus_log_p + entropy))
        size = size + g_entropy * self.p * (self.e + entropy_error) + f * self.smooth_mass + g_nll * q
        certainty = finite(-torch.expm1(self.log_p))
        size = size + of_target * (certainty + self.p * self.e)
        size = size + self.row_weight_error * f * (self.p * pull + self.mass.abs())
        size = finite(size)
        size = size.amax(-1, keepdim=True) if size.shape[-1] else size
        naive = pull + f * self.mass.abs().sum(-1, keepdim=True) + g_nll * self.q.abs().sum(-1, keepdim=True)
        naive = (naive + g_entropy * (1 + entropy)) * self.scale
        allowed = self._allow(size * self.slope, naive.expand_as(self.slope))
        if self.cap is not None:
            allowed = allowed + self.unit * self.slope_error * finite(self._gradient_of_z(f, stats))
        if any(g is not None for g in stats):  # nobody says what the gradient of a NaN is
            allowed = torch.where(self.sick, torch.inf, allowed)
        return self.unflat(allowed)

    def _gradient_of_z(self, f: Tensor, stats: list[Tensor | None]) -> Tensor:
        """A magnitude of dL/dz."""
        of_stats = sum((g.abs().unsqueeze(-1) for g in stats if g is not None), start=torch.zeros_like(self.m))
        size = f * (1 + self.mass.abs().sum(-1, keepdim=True) + 2 * self.z_loss * finite(self.lse).abs())
        return size + of_stats * (1 + self.q.abs().sum(-1, keepdim=True) + self.minus_log_p * self.p)

    def target_gradient(self, upstream: list[Tensor | None], dtype: torch.dtype) -> Bounded:
        """Of probabilities: a class weight or upstream gradient of 0 makes it 0 even at a logit of -inf."""
        loss, _, nll, _ = upstream
        f = torch.zeros_like(self.m) if loss is None else (loss.unsqueeze(-1) if loss.dim() else loss.expand_as(self.m))
        if self.options["reduction"] == "mean":
            f = f / self.total
        f = f * self.row_weight
        g = f * self.target_weight + (0 if nll is None else nll.unsqueeze(-1))
        infinite = (self.log_p == -torch.inf) & ~self.sick
        exact = torch.where((g == 0) & infinite, 0, -g * self.log_p)
        exact = torch.where(self.sick, torch.nan, exact)
        parts = f.abs() * self.target_weight.abs() + (0 if nll is None else nll.abs().unsqueeze(-1))
        allowed = self._allow(parts * self.e, parts * (1 + self.minus_log_p))
        nothing = (g == 0) & (self.sick if nll is None else self.sick | infinite)  # 0 or NaN
        if self.plain:  # which multiplies 0 by an infinite loss or nll, and adds the one's infinity to the other's
            lost = (f == 0) & (self.mass != 0) if loss is not None else torch.zeros_like(infinite)
            if nll is not None:
                of_nll = nll.unsqueeze(-1)
                lost = lost | (of_nll == 0) & (self.q != 0) | (f * self.target_weight * of_nll < 0)
            nothing = nothing | (infinite & lost) | (self.sick & (self.mass == 0))
        allowed = torch.where(nothing, torch.inf, allowed)
        return self.rounded(self.unflat(exact), self.unflat(allowed), dtype)

    def weight_gradient(self, exact: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Bounded:
        mass = (1 - self.options["label_smoothing"]) * self.q + self.share()
        terms = self.factor(upstream) * mass.abs()
        terms = terms.reshape(-1, terms.shape[-1])
        # A weight of 0 takes part in no loss, but its gradient sees the logit of -inf, which exact_loss replaces.
        infinite = (self.log_p == -torch.inf) & ~self.sick & (self.target_weight == 0) & (terms.reshape(mass.shape) > 0)
        if upstream is not None:
            sign = upstream.sign() if not upstream.dim() else upstream.sign().unsqueeze(-1)
            sign = sign * self.row_weight.sign() * (self.total.sign() if self.options["reduction"] == "mean" else 1)
            exact = exact + torch.where(infinite, torch.inf * sign * mass, 0).reshape(terms.shape).sum(0)
        e, mlp = (t.reshape(-1, t.shape[-1]) for t in (self.e + 1, self.minus_log_p))
        allowed = (self.unit * (terms * (e + mlp)) + FLOAT64 * terms * (1 + mlp)).sum(0) * 2
        if self.lost.any() or self.sick.any():
            allowed = torch.full_like(allowed, torch.inf)
        return self.rounded(exact, allowed + torch.finfo(self.work).smallest_normal, dtype)

    def share(self) -> float:
        return self.options["label_smoothing"] / max(self.q.shape[-1], 1)

    @staticmethod
    def rounded(
        exact: Tensor, allowed: Tensor, dtype: torch.dtype, roundings: int = 1, factor: Tensor | float = 1.0
    ) -> Bounded:
        """With the roundings to the dtype; where there are two, ``factor`` comes after the first."""
        size = finite(exact).abs()
        allowed = allowed + roundings * (oracle.roundoff(dtype) * size + oracle.underflow(dtype))
        if roundings > 1:
            factor = torch.as_tensor(factor, dtype=torch.float64)
            allowed = allowed + oracle.underflow(dtype) * factor
            before = (size + allowed) / factor.clamp(max=1)
            allowed = torch.where(before >= torch.finfo(dtype).max, torch.inf, allowed)
        return Bounded(exact, allowed)


def exact_loss(logits: Tensor, target: Tensor, weight: Tensor | None, rows: Rows) -> Tensor:
    """The oracle's reduced loss, differentiable in logits and weight; ``rows`` are of the same call."""
    options, dim = dict(rows.options), rows.dim
    z = rows.unflat(
        oracle.transformed(torch.where(rows.dead, 0, logits), options.pop("softcap"), options.pop("logit_scale"))
    )
    size = finite(z.detach()).abs().amax(dim, keepdim=True)
    z = torch.where(rows.massless, -2 * size - 1e4, z)  # whose exponential is 0
    if options["label_smoothing"] < 1 or target.is_floating_point():
        return oracle.cross_entropy_loss(z, target, weight, **options)
    # Nothing of the target class's own term, also where that is infinite.
    uniform = torch.full_like(z, 1 / z.shape[dim])
    z_loss = options["z_loss"] * float(rows.z_factor)
    each = oracle.cross_entropy_loss(z, uniform, weight, reduction="none", z_loss=z_loss)
    each = torch.where((rows.row_weight != 0).squeeze(-1), each * rows.row_weight.squeeze(-1), 0)
    if options["reduction"] == "none":
        return each
    return each.sum() / (rows.total if options["reduction"] == "mean" else 1)


def log_softmax_bound(values: Tensor, exact: Tensor, dim: int, work: torch.dtype, dtype: torch.dtype) -> Bounded:
    """Of log_softmax: relative to the distance from the largest logit and the logarithm of the sum, each exact."""
    if not exact.numel():
        return Bounded(exact, exact)
    x = values.movedim(dim, -1)
    rows = Rows(x.reshape(-1, x.shape[-1]), torch.zeros(x.shape[:-1].numel(), dtype=torch.int64), None, PLAIN, work)
    allowed = rows.unit * rows.e + FLOAT64 * (1 + rows.minus_log_p)
    allowed = torch.where(rows.lost, torch.inf, allowed).reshape(x.shape).movedim(-1, dim)
    return Rows.rounded(exact, allowed, dtype)


PLAIN: dict[str, Any] = {
    "ignore_index": -100,
    "reduction": "none",
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": None,
    "logit_scale": 1.0,
    "denominator": None,
    "row_weight": None,
}
