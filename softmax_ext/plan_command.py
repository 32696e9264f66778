"""``python -m softmax_ext plan N D C dtype [memory]`` prints the plans of a linear cross entropy.

A star marks the plan that is chosen.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch

from . import plans

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZES = {"rows": "N, the rows of the input", "in_features": "D", "num_classes": "C"}


def _size(text: str) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0; got {text!r}")
    return int(text)


def _dtype(text: str) -> torch.dtype:
    name = text.removeprefix("torch.")
    if name not in _DTYPES:
        raise argparse.ArgumentTypeError(f"must be {', '.join(_DTYPES)}; got {text!r}")
    return _DTYPES[name]


def _memory(text: str) -> int:
    found = re.fullmatch(r"(\d+) ?(|KiB|MiB|GiB)", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a number of bytes, like 314572800 or 300MiB; got {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m softmax_ext plan", description="the plans of linear_cross_entropy")
    for argument, meaning in _SIZES.items():
        parser.add_argument(argument, type=_size, help=meaning)
    parser.add_argument("dtype", type=_dtype, help=f"of input and weight: {', '.join(_DTYPES)}")
    parser.add_argument("memory", type=_memory, nargs="?", help="bytes beyond the gradients; also 300MiB or 2GiB")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Prints a line for each plan, with a star before the one that is chosen; exits with 2 and a text if it cannot."""
    parser = _parser()
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = plans.Problem(given.rows, given.in_features, given.num_classes, given.dtype, device)
    try:
        chosen = plans.choose(problem, plans.Limits(memory=given.memory))
    except ValueError as error:
        parser.error(str(error))
    print(f"  {'plan':8}{'chunk':>10}{'chunks':>8}{'products':>10}{'MiB':>12}   on {device}")
    for plan in plans.all_plans(problem, given.memory):
        mark = "*" if plan == chosen else " "
        print(f"{mark} {plan.name:8}{plan.chunk:10}{plan.chunks:8}{plan.products:10}{plan.bytes / (1 << 20):12.1f}")
