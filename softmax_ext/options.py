"""The options of a cross entropy: their names, and the one order that all operators and Functions use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2
"""The operators' codes for ``reduction``."""
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


class Options(NamedTuple):
    """The options as the operators need them; ``reduction`` is a code, ``dim`` the dimension of the classes.

    - ``weighs_by_probability``: row_weight="probability".
    - ``skips_ignored``: the logits of an ignored row do not matter. Its lse, nll and entropy are 0, without a
      derivative, and its prediction is -1.
    """

    dim: int
    reduction: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    weighs_by_probability: bool = False
    skips_ignored: bool = False

    def scales_z_loss(self, target: Tensor | None, weight: Tensor | None) -> bool:
        """Whether the z terms of a mean have a denominator of their own, the rows that count without class weights.

        Not with a denominator that is given. The target is None where it is probabilities.
        """
        has_classes = target is not None and not target.is_floating_point()
        return self.z_loss != 0 and weight is not None and self.reduction == MEAN and has_classes

    @staticmethod
    def split(arguments: Sequence[Any]) -> tuple[Options, Sequence[Any]]:
        """Splits an operator's arguments, which begin with the options, into these and the other arguments."""
        count = len(Options._fields)
        return Options(*arguments[:count]), arguments[count:]


SCHEMA = (
    "int dim, int reduction, int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale, "
    "bool weighs_by_probability, bool skips_ignored"
)
"""The fields of Options in the schema of an operator. csrc/ops/schema.cpp has the same for the C++ operators."""


class Keywords(TypedDict, total=False):
    """The keywords that torch.nn.functional.cross_entropy does not have, with the names that callers use."""

    dtype: torch.dtype | None
    z_loss: float
    softcap: float | None
    logit_scale: float
    denominator: float | Tensor | None
