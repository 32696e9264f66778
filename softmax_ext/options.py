"""The options of a cross entropy: their names and their one order, which every operator and every Function follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch

NONE, MEAN, SUM = 0, 1, 2
"""The operators' codes for ``reduction``."""
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


class Options(NamedTuple):
    """The arguments of a cross entropy that are numbers; ``reduction`` is a code, ``dim`` that of the classes."""

    dim: int
    reduction: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float

    @staticmethod
    def split(arguments: Sequence[Any]) -> tuple[Options, Sequence[Any]]:
        """The options with which an operator's arguments begin, and the rest of them."""
        count = len(Options._fields)
        return Options(*arguments[:count]), arguments[count:]


SCHEMA = (
    "int dim, int reduction, int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale"
)
"""The same in the schema of an operator; csrc/ops/schema.cpp has it for those in C++."""


class Keywords(TypedDict, total=False):
    """The options that torch.nn.functional.cross_entropy does not have, as a caller names them."""

    dtype: torch.dtype | None
    z_loss: float
    softcap: float | None
    logit_scale: float
