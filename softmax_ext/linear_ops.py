"""Linear cross entropy as two operators, forward and backward, which torch.compile and torch.export see.

Each chooses a plan when it runs, since in traced code the sizes may not be known. chunks.py or class_chunks.py runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunks, class_chunks, float16, ops, plans
from .autograd import refusals
from .dtypes import arithmetic_dtype
from .operands import LiveRows, Operands, Run
from .options import MEAN, NONE, SCHEMA, Options
from .plans import LIMITS_SCHEMA, Limits, LinearPlan
from .reference import Upstream, divisor_of, total_weight, undivided

_FORWARD = {plans.WHOLE: chunks.forward, plans.ROWS: chunks.forward, plans.CLASSES: class_chunks.forward}
_GRADIENTS = {plans.WHOLE: chunks.gradients, plans.ROWS: chunks.gradients, plans.CLASSES: class_chunks.gradients}


def _numbers(flags: Sequence[bool]) -> list[int]:
    """The flags as 0 and 1: torch.jit.trace takes no list of bools."""
    return [int(flag) for flag in flags]


class Call(NamedTuple):
    """The arguments of a call that are not tensors; see linear_cross_entropy."""

    options: Options
    dtype: torch.dtype | None
    stats: bool
    limits: Limits
    later: tuple[bool, bool, bool, bool]
    """Which gradients of input, linear_weight, linear_bias and target a backward may compute from new logits."""

    def arguments(self, needs: Sequence[bool], rounds: bool, denominator: Tensor | None) -> tuple[Any, ...]:
        """The arguments of ``forward`` behind the operands."""
        flags = (_numbers(needs), _numbers(self.later), rounds)
        return (*self.options, self.dtype, self.stats, *self.limits, *flags, denominator, ops.VERSION)

    def backward_arguments(self, needs: Sequence[bool]) -> tuple[Any, ...]:
        """The arguments of ``backward`` behind the operands."""
        return (*self.options, *self.limits, _numbers(needs), _numbers(self.later))


def _choose(operands: Operands, needs: tuple[Sequence[bool], bool], limits: Limits) -> LinearPlan:
    """The plan of a call, from its shapes alone: a count of live rows is another one in each step."""
    return plans.choose(operands.problem(*needs), limits._replace(live_rows=None))


def plan_of_forward(operands: Operands, needs: Sequence[bool], later: Sequence[bool], limits: Limits) -> LinearPlan:
    """The plan of ``forward``."""
    return _choose(operands, (needs, False) if any(needs) else (later[:3], later[3]), limits)


def plan_of_backward(
    operands: Operands, state: Tensor | None, needs: Sequence[bool], later: Sequence[bool], limits: Limits
) -> LinearPlan:
    """The plan of ``backward``.

    A state is of forward's logits. The same products, of the same rows in the same chunks, give their bits again, and
    so the largest logit is the state's maximum again.
    """
    which = later if state is not None else needs
    return _choose(operands, (which[:3], which[3]), limits)


def _forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    refusals.refuse_tangents("linear_cross_entropy", input, linear_weight, linear_bias, target)
    options, (dtype, stats, *others) = Options.split(arguments)
    limits, (needs, later, rounds, denominator, _) = Limits.split(others)
    operands = Operands(input, linear_weight, linear_bias, target, weight, row_weight)
    options = options._replace(skips_ignored=True)
    plan = plan_of_forward(operands, needs, later, limits)
    wide = arithmetic_dtype(input.dtype, target.dtype, dtype or input.dtype)
    total = total_weight(target, weight, options, row_weight) if denominator is None else denominator.clone()
    divides = options.reduction == MEAN and input.dtype != torch.float16  # see chunks.py
    divisor = total if divides else undivided(total)
    with torch.autocast(input.device.type, enabled=False):  # it would turn float16's float32 products into float16
        live = LiveRows(operands, options.ignore_index, limits.live_rows)
        divisor_of_all = float16.divisor_of_forward(operands, options) if any(needs) else None
        if divisor_of_all is not None:
            operands = float16.divided_by(operands, divisor_of_all)
        run = Run(operands, live, options, wide, plan, limits)
        (loss, *of_rows), state, gradients = _FORWARD[plan.name](run, stats, needs, divisor)
        if divisor_of_all is not None:
            loss = loss * divisor_of_all
    if rounds:
        chunks.convert(gradients, [plans.gradient_dtype(input.dtype)] * len(gradients))
    if options.reduction != NONE:
        loss = loss.sum(dtype=torch.float64)
    if options.reduction == MEAN:
        loss = loss / divisor_of(total)
    if live.poison is not None:
        loss = loss + live.poison
    return [loss.to(dtype or input.dtype), total, state, *of_rows, *gradients]


def _total_shape(target: Tensor, weight: Tensor | None, denominator: Tensor | None, options: Options) -> Sequence[int]:
    """That of the total weight, which a sum has here too."""
    return ops.total_shape(target, weight, denominator, options) if options.reduction == MEAN else []


def _fake_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    options, (dtype, stats, *others) = Options.split(arguments)
    _, (needs, _, _, denominator, _) = Limits.split(others)
    rows = [input.shape[0], *linear_weight.shape[1:-1]]
    wide = arithmetic_dtype(input.dtype, target.dtype, dtype or input.dtype)
    results = [
        input.new_empty(rows if options.reduction == NONE else [], dtype=dtype or input.dtype),
        input.new_empty(_total_shape(target, weight, denominator, options), dtype=torch.float64),
        input.new_empty(chunks.state_shape(options, target, rows, needs), dtype=wide),
    ]
    if stats:
        results += [input.new_empty(rows, dtype=wide) for _ in range(3)]
        results.append(input.new_empty(rows, dtype=torch.int64))
    of_gradients = plans.gradient_dtype(input.dtype)
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:-1])
    needed = (shape for shape, is_needed in zip(shapes, needs, strict=True) if is_needed)
    return results + [input.new_empty(shape, dtype=of_gradients) for shape in needed]


def _backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    grad_nll: Tensor | None,
    grad_entropy: Tensor | None,
    total: Tensor,
    state: Tensor | None,
    entropy: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    options, others = Options.split(arguments)
    limits, (needs, later) = Limits.split(others)
    # The gradients of loss and statistics are float64 if forward computed in float64.
    given = [t.dtype for t in (grad_loss, grad_lse, grad_nll, grad_entropy, state) if t is not None]
    wide = arithmetic_dtype(input.dtype, target.dtype, *given)
    if grad_loss is not None:
        grad_loss = grad_loss.to(wide)
        if options.reduction == MEAN:
            grad_loss = grad_loss / divisor_of(total).to(wide)
        grad_loss = grad_loss.expand(input.shape[0], *linear_weight.shape[1:-1])
    upstream = Upstream(grad_loss, grad_lse, grad_nll, grad_entropy)
    operands = Operands(input, linear_weight, linear_bias, target, weight, row_weight)
    *parameters, needs_target = needs
    options = options._replace(skips_ignored=True)
    plan = plan_of_backward(operands, state, needs, later, limits)
    with torch.autocast(input.device.type, enabled=False):
        run = Run(operands, LiveRows(operands, options.ignore_index, limits.live_rows), options, wide, plan, limits)
        divisor = float16.divisor_of_backward(operands, options, upstream, needs_target)
        if divisor is not None:
            upstream = Upstream(*(None if g is None else g / divisor for g in upstream))
        results = _GRADIENTS[plan.name](run, upstream, undivided(total), state, entropy, parameters, needs_target)
        if divisor is not None:
            results = [t.mul_(divisor) for t in results]
    differentiable = (input, linear_weight, linear_bias, target)
    chunks.convert(
        results, [t.dtype for t, needed in zip(differentiable, needs, strict=True) if needed and t is not None]
    )
    return results


def _fake_backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    grad_nll: Tensor | None,
    grad_entropy: Tensor | None,
    total: Tensor,
    state: Tensor | None,
    entropy: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    *arguments: Any,
) -> list[Tensor]:
    *_, needs, _ = arguments
    differentiable = (input, linear_weight, linear_bias, target)
    return [t.new_empty(t.shape) for t, needed in zip(differentiable, needs, strict=True) if needed and t is not None]


_OPERANDS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? row_weight"
_UPSTREAM = "Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_nll, Tensor? grad_entropy"

# ``dim`` must be 1, since the logits are [N, C, *K]. ``skips_ignored`` has no effect: they always do.
#
# Returns [loss, total_weight, state], then with stats [lse, nll, entropy, prediction], then those gradients of input,
# linear_weight and linear_bias that ``needs`` names. The gradients are for an upstream gradient of 1. Those of float16
# are divided by float16.divisor_of_forward, and with the mean for an upstream gradient of total_weight. With ``rounds``
# they have the operands' dtype, in float16 float32. Without it they are the sums of the plan, which nothing rounds
# before it is multiplied by the upstream gradient. The fake ones are as with it, because the plan is not known where a
# size is not.
# The state, max and rest of each row, is for the backward; it is empty if ``needs`` names any. ``later`` has the
# gradients of input, linear_weight, linear_bias and target that the backward may compute.
forward = torch.library.custom_op(
    "softmax_ext::linear_cross_entropy",
    _forward,
    mutates_args=(),
    schema=f"({_OPERANDS}, {SCHEMA}, ScalarType? dtype, bool stats, {LIMITS_SCHEMA}, "
    "int[] needs, int[] later, bool rounds, Tensor? denominator, int version) -> Tensor[]",
)
forward.register_fake(_fake_forward)

# Returns those gradients of input, linear_weight, linear_bias and target that ``needs`` names. ``state`` and
# ``entropy``, which only the gradient of the entropy needs, are those of a forward with these limits and ``later``.
# Without a state they are computed again.
backward = torch.library.custom_op(
    "softmax_ext::linear_cross_entropy_backward",
    _backward,
    mutates_args=(),
    schema=f"({_UPSTREAM}, Tensor total, Tensor? state, Tensor? entropy, {_OPERANDS}, {SCHEMA}, "
    f"{LIMITS_SCHEMA}, int[] needs, int[] later) -> Tensor[]",
)
backward.register_fake(_fake_backward)
