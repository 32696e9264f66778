"""Loads the CPU library and registers the fake kernels of its operators.

Importing this module makes ``torch.ops.softmax_ext`` available:

- The CPU library (csrc/ops/cpu) has the schemas and the CPU kernels.
- The CUDA library has the CUDA kernels (see cuda.py).
- This module has the fake kernels, which return results without data for meta tensors, torch.compile and torch.export.

If the CPU library cannot be loaded, the operators are missing and ``load_error`` is a sentence that says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cuda, libraries
from ._version import __version__
from .dtypes import arithmetic_dtype
from .options import MEAN, NONE, Options

VERSION = sum(int(part) * 10000 ** (2 - i) for i, part in enumerate(__version__.split(".")))
"""The package's version as a number: an argument of every operator that has a derivative under torch.compile.

No operator computes with it. It is part of the key of torch's compile cache on disk, so that an upgraded package never
runs an old compiled backward.
"""


def _choose_isa(library: libraries.CpuLibrary) -> str | None:
    """Selects the kernels by SOFTMAX_EXT_CPU_CAPABILITY or torch's own choice; returns an error's text or None."""
    forced = os.environ.get("SOFTMAX_EXT_CPU_CAPABILITY", "").upper()
    available = library.available_isas()
    if forced and forced not in available:
        return f"SOFTMAX_EXT_CPU_CAPABILITY must be one of {', '.join(available)} on this machine; got {forced}"
    capability = forced or torch.backends.cpu.get_cpu_capability()
    library.select_isa(capability if capability in available else "DEFAULT")
    return None


library, load_error = libraries.load_cpu()
if library is not None:
    load_error = _choose_isa(library)


def state_values(probabilities: bool, options: Options) -> int:
    """How many the state has for each row (csrc/params.h)."""
    return 4 if probabilities else 3 if options.weighs_by_probability else 2


def total_shape(
    target: Tensor | None, weight: Tensor | None, denominator: Tensor | None, options: Options
) -> Sequence[int]:
    """The shape of total_weight (csrc/ops/schema.cpp); the target is None where it is probabilities."""
    if denominator is not None:
        return denominator.shape
    if options.reduction != MEAN:
        return [0]
    return [2] if options.scales_z_loss(target, weight) else []


def fake_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any) -> list[Tensor]:
    """The results of cross_entropy, without data."""
    options, (dtype, stats, precompute_grad, *rest) = Options.split(arguments)
    dim = options.dim % input.dim()
    batch = [*input.shape[:dim], *input.shape[dim + 1 :]]
    loss_dtype = dtype or input.dtype
    probabilities = target.is_floating_point()
    arithmetic = arithmetic_dtype(input.dtype, loss_dtype, target.dtype)
    denominator = rest[0] if rest else None  # it may be left out
    outputs = [
        input.new_empty(batch if options.reduction == NONE else [], dtype=loss_dtype),
        input.new_empty([state_values(probabilities, options), *batch], dtype=arithmetic),
        input.new_empty(total_shape(target, weight, denominator, options), dtype=torch.float64),
    ]
    if stats:
        outputs += [input.new_empty(batch, dtype=arithmetic) for _ in range(3)]
        outputs.append(input.new_empty(batch, dtype=torch.int64))
    if precompute_grad:
        outputs.append(torch.empty_like(input))
    return outputs


def _fake_cross_entropy_(input: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    options, (dtype, stats, *rest) = Options.split(arguments)
    arguments = (*options, dtype, stats, False, *rest)
    loss, state, *results = fake_cross_entropy(input, target, weight, *arguments)
    no_state = state.new_empty([0])  # no backward can follow, because the logits are lost
    return (loss, no_state, *results, *(input.new_empty([0]) for _ in range(5 - len(results))))


def _part_fields(target: Tensor | None, options: Options, stats: bool) -> int:
    """As PartFields of csrc/row_part.h counts them; the target is None where it is probabilities."""
    probabilities = target is None or target.is_floating_point()
    return 3 + 2 * (probabilities or options.label_smoothing != 0) + 2 * probabilities + 2 * stats


def _fake_cross_entropy_part(input: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any) -> Tensor:
    options, (_, stats, *_) = Options.split(arguments)
    dim = options.dim % input.dim()
    batch = [*input.shape[:dim], *input.shape[dim + 1 :]]
    return input.new_empty([_part_fields(target, options, stats), *batch], dtype=torch.float64)


def _fake_cross_entropy_of_parts(
    parts: Tensor, target: Tensor | None, weight: Tensor | None, *arguments: Any
) -> list[Tensor]:
    options, (dtype, wide, stats, denominator, *_) = Options.split(arguments)
    batch = parts.shape[2:]
    arithmetic = torch.float64 if wide else torch.float32
    outputs = [
        parts.new_empty(batch if options.reduction == NONE else [], dtype=dtype),
        parts.new_empty([state_values(target is None, options), *batch], dtype=arithmetic),
        parts.new_empty(total_shape(target, weight, denominator, options), dtype=torch.float64),
    ]
    if stats:
        outputs += [parts.new_empty(batch, dtype=arithmetic) for _ in range(3)]
        outputs.append(parts.new_empty(batch, dtype=torch.int64))
    return outputs


def _fake_cross_entropy_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, _, _, input, target, *_ = arguments  # behind four upstream gradients
    # State, total_weight and entropy come before the options, and what follows may be left out.
    _, (needs_input, needs_target, *_) = Options.split(arguments[10:])
    return (
        torch.empty_like(input) if needs_input else input.new_empty([0]),
        torch.empty_like(target) if needs_target else target.new_empty([0]),
    )


def fake_softmax(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None) -> Tensor:
    """The result of softmax, without data."""
    return torch.empty_like(input, dtype=dtype or input.dtype)


def fake_softmax_backward(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    """The result of softmax_backward, without data."""
    return torch.empty_like(output, dtype=dtype)


def _fake_writes_in_place(*args: object) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "cross_entropy": fake_cross_entropy,
    "cross_entropy_": _fake_cross_entropy_,
    "cross_entropy_part": _fake_cross_entropy_part,
    "cross_entropy_of_parts": _fake_cross_entropy_of_parts,
    "cross_entropy_backward": _fake_cross_entropy_backward,
    "cross_entropy_backward_": _fake_writes_in_place,
    "softmax": fake_softmax,
    "softmax_backward": fake_softmax_backward,
    "scale_rows_": _fake_writes_in_place,
}


if library is not None:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"softmax_ext::{_name}", _fake)
    cuda.load(_FAKES)
    cross_entropy = torch.ops.softmax_ext.cross_entropy.default
    cross_entropy_ = torch.ops.softmax_ext.cross_entropy_.default
    cross_entropy_part = torch.ops.softmax_ext.cross_entropy_part.default
    cross_entropy_of_parts = torch.ops.softmax_ext.cross_entropy_of_parts.default
    cross_entropy_backward = torch.ops.softmax_ext.cross_entropy_backward.default
    cross_entropy_backward_ = torch.ops.softmax_ext.cross_entropy_backward_.default
    softmax = torch.ops.softmax_ext.softmax.default
    softmax_backward = torch.ops.softmax_ext.softmax_backward.default
    scale_rows_ = torch.ops.softmax_ext.scale_rows_.default
