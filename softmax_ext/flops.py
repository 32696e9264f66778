"""What torch.utils.flop_counter.FlopCounterMode counts for linear_cross_entropy: its matrix products, 2 N D C each.

The mode sees the operators of linear_ops.py and not what they call, so it needs a formula for each. What autograd takes
instead, F.linear and torch's products of all logits at once, the mode counts by itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import linear_ops, plans
from .imports import around_import
from .operands import LiveRows, Operands
from .options import Options
from .plans import Limits, LinearPlan

_MODULE = "torch.utils.flop_counter"


def _rows(operands: Operands, options: Options, limits: Limits) -> int:
    """How many rows are computed; all of them where the target has no values, as a fake one."""
    if type(operands.target) is not Tensor:
        return operands.input.shape[0]
    return LiveRows(operands, options.ignore_index, limits.live_rows).count


def _count(operands: Operands, plan: LinearPlan, rows: int, needs: Sequence[bool], sweeps: tuple[bool, bool]) -> int:
    """2 N D C for each product, but for those classes whose logits the plan *classes* keeps between its two sweeps."""
    features, columns = operands.linear_weight.shape[-1], math.prod(operands.linear_weight.shape[:-1])
    needs_input, needs_weight, _ = needs
    projected = columns
    if plan.name == plans.CLASSES and all(sweeps):
        projected += (plan.chunks - plan.kept) * plan.chunk  # all chunks but the last, which is kept, are of this size
    return 2 * rows * features * (projected + (needs_input + needs_weight) * columns)


def _forward(*arguments: Any, **_: Any) -> int:
    operands = Operands(*arguments[:6])
    options, (_dtype, _stats, *others) = Options.split(arguments[6:])
    limits, (needs, later, *_rest) = Limits.split(others)
    plan = linear_ops.plan_of_forward(operands, needs, later, limits)
    return _count(operands, plan, _rows(operands, options, limits), needs, (True, any(needs)))


def _backward(*arguments: Any, **_: Any) -> int:
    state, operands = arguments[5], Operands(*arguments[7:13])
    options, others = Options.split(arguments[13:])
    limits, (needs, later) = Limits.split(others)
    plan = linear_ops.plan_of_backward(operands, state, needs, later, limits)
    return _count(operands, plan, _rows(operands, options, limits), needs[:3], (state is None, True))


def _register() -> None:
    register = sys.modules[_MODULE].register_flop_formula
    register(torch.ops.softmax_ext.linear_cross_entropy, get_raw=True)(_forward)
    register(torch.ops.softmax_ext.linear_cross_entropy_backward, get_raw=True)(_backward)


@contextmanager
def _registering() -> Iterator[None]:
    yield
    _register()


if _MODULE in sys.modules:
    _register()
else:
    around_import(_MODULE, _registering)
