"""The operands of a linear cross entropy: their shapes, and which of their rows a plan computes.

Shapes: ``input`` X [N, D], ``linear_weight`` W [C, *K, D], ``linear_bias`` b [C, *K]. The logits are [N, C, *K]. The
target has class indices [N, *K] or probabilities [N, C, *K].

A row is live unless all its class indices are ignored. The others are left out where the host knows how many are live:
on a CPU, or because the caller says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .options import Options
from .plans import Limits, LinearPlan, Problem
from .reference import is_live

_OP = "linear_cross_entropy"


class Operands(NamedTuple):
    """The tensors of a call, in the shapes above; ``weight`` [C] and ``row_weight`` [N, *K] are factors of the loss."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    row_weight: Tensor | None

    def problem(self, needs: Sequence[bool], needs_target: bool) -> Problem:
        """What the plan depends on; ``needs`` says which gradients of input, weight and bias are computed."""
        needs_input, needs_weight, _ = needs
        classes, positions = math.prod(self.linear_weight.shape[:-1]), math.prod(self.linear_weight.shape[1:-1])
        of_target = self.target.element_size() if needs_target else 0
        sizes, device = (self.input.shape[0], self.input.shape[1], classes), self.input.device.type
        return Problem(*sizes, self.input.dtype, device, needs_input, needs_weight, of_target, positions)

    @property
    def loss_shape(self) -> list[int]:
        """[N, *K]."""
        return [self.input.shape[0], *self.linear_weight.shape[1:-1]]


# ---- class indices ----


def _checks_targets(target: Tensor) -> bool:
    """On a CPU always; elsewhere on demand, as targets_are_checked() of csrc/ops/cuda/cross_entropy.cpp has it."""
    on_demand = os.environ.get("SOFTMAX_EXT_CHECK_TARGETS", "") not in ("", "0")
    return not target.is_floating_point() and (target.device.type == "cpu" or on_demand)


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for a class out of range, before anything is computed. The kernels see one chunk only."""
    if not _checks_targets(target):
        return
    given = target.long()  # as uint8, 256 classes would wrap to 0
    bad = is_live(target, ignore_index) & ((given < 0) | (given >= classes))
    if bad.any():
        position = [int(i) for i in bad.nonzero()[0]]
        need = f"hold classes in [0, {classes}) or ignore_index ({ignore_index})"
        found = int(target[tuple(position)])
        torchs = f"Target {found} is out of bounds."
        checks.refuse(IndexError, _OP, "target", need, f"{found} at position {position}", torchs)


# ---- live rows ----


def rows_are_live(target: Tensor, ignore_index: int) -> Tensor:
    """[N] bool: which rows of the class indices [N, *K] hold an index that is not ignored."""
    live = is_live(target, ignore_index)
    return live.flatten(1).any(1) if live.dim() > 1 else live


def _check_count(count: int | None, right: int, what: str) -> None:
    if count not in (None, right):
        checks.refuse(ValueError, _OP, "live_rows", f"be {right}, {what}, or None", f"{count}")


def _first_rows(live: Tensor, count: int) -> Tensor:
    """The numbers of ``count`` rows, the live ones first; the host does not wait for ``live``."""
    return live.byte().argsort(descending=True, stable=True)[:count]


def _host_knows(target: Tensor) -> bool:
    """Whether the host can read the target without waiting for a device."""
    return target.device.type == "cpu"


class LiveRows:
    """The rows that a plan computes, and what goes into them and out of them.

    Args:
        operands: the tensors.
        ignore_index: the class index that does not count.
        count: how many rows are live, or None. Where the host can tell, ValueError if it is wrong.

    Attributes:
        numbers: those of the rows; None for all.
        count: how many are computed.
        poison: a NaN if the ``count`` that was given is wrong, else 0, [] float32; None if it is known to be right.
    """

    def __init__(self, operands: Operands, ignore_index: int, count: int | None) -> None:
        self.operands = operands
        self.numbers: Tensor | None = None
        self.poison: Tensor | None = None
        self.count = operands.input.shape[0]
        target = operands.target
        if target.is_floating_point():
            _check_count(count, self.count, "the number of rows, with a target of probabilities")
            return
        if _host_knows(target):
            live = rows_are_live(target, ignore_index)
            numbers = live.nonzero().squeeze(1)
            _check_count(count, numbers.numel(), "the number of rows with a class that is not ignored")
            self.numbers = numbers if numbers.numel() < self.count else None
        elif count is not None:
            live = rows_are_live(target, ignore_index)
            self.poison = torch.where(live.sum() == count, 0.0, torch.nan)
            if count < self.count:  # one at least, which a wrong count makes NaN
                self.numbers = _first_rows(live, max(count, 1))
        if self.numbers is not None:
            self.count = self.numbers.numel()

    def pick(self, tensor: Tensor, rows: slice | None = None, dim: int = 0) -> Tensor:
        """The values [rows, ...] of a tensor [N, ...]: of all live rows, or of some; ``dim`` is N's dimension."""
        rows = rows or slice(0, self.count)
        if self.numbers is None:
            return tensor.narrow(dim, rows.start, rows.stop - rows.start)
        return tensor.index_select(dim, self.numbers[rows])

    def input(self, rows: slice | None = None) -> Tensor:
        """The input's values, as ``pick`` gives them.

        Where rows are left out by a wrong count, the first row is NaN, and so is the weight's gradient.
        """
        x = self.pick(self.operands.input, rows)
        if self.poison is not None and self.numbers is not None and (rows is None or rows.start == 0):
            x[:1] += self.poison  # of a copy
        return x

    def put(self, values: Tensor, into: Tensor, rows: slice | None = None, dim: int = 0) -> None:
        """Writes such values into a tensor [N, ...]: the reverse of ``pick``."""
        rows = rows or slice(0, self.count)
        if self.numbers is None:
            into.narrow(dim, rows.start, rows.stop - rows.start).copy_(values)
        else:
            into.index_copy_(dim, self.numbers[rows], values)


# ---- what a plan is run with ----


class Run(NamedTuple):
    """What forward and backward of a plan take alike.

    Attributes:
        operands: the tensors.
        live: the rows that are computed.
        options: those of the cross entropy, with skips_ignored.
        wide: the dtype of the arithmetic on each logit, of the losses and of the statistics.
        plan: how.
        limits: those of the call.
    """

    operands: Operands
    live: LiveRows
    options: Options
    wide: torch.dtype
    plan: LinearPlan
    limits: Limits

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.limits.logits_dtype or self.operands.input.dtype
