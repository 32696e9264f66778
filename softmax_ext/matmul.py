"""The matrix products of a linear layer and of its gradients, in the way that is fastest and rounds least here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import internals

# A product that passes through a buffer of its own does so a slice at a time, which stays in cache.
_SLICE_BYTES = 2 << 20


@cache
def _amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def prefers_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies faster than what ``torch.mm`` calls: MKL, whose X W^T is slow in float32 on AMD.

    A rule and not a measurement, so that the same bits come out every time. For the other two products it is not asked:
    there MKL is nearly as fast, and the errors of its dZ W are a third smaller.
    """
    is_float = x.device.type == "cpu" and x.dtype == torch.float32
    has_onednn = internals.onednn_linear is not None and torch.backends.mkldnn.is_available()
    return is_float and x.shape[-1] > 0 and has_onednn and _amd()


def _onednn(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    assert internals.onednn_linear is not None
    return internals.onednn_linear(x, matrix, bias, "none", [], "")


def _slices(size: int, bytes_each: int) -> Iterator[slice]:
    step = max(_SLICE_BYTES // max(bytes_each, 1), 1)
    return (slice(begin, min(begin + step, size)) for begin in range(0, size, step))


def project(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Out = x matrix^T + bias."""
    if prefers_onednn(x):  # which allocates its result: a slice at a time, so that malloc can use the memory again
        for s in _slices(matrix.shape[0], x.shape[0] * x.element_size()):
            out[:, s] = _onednn(x, matrix[s], None if bias is None else bias[s])
    elif bias is None:
        torch.mm(x, matrix.t(), out=out)
    else:
        torch.addmm(bias, x, matrix.t(), out=out)


def multiply(dz: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Out = dz matrix; ``out`` may be wider than the factors."""
    if out.dtype == dz.dtype:
        torch.mm(dz, matrix, out=out)
    elif dz.is_cuda and internals.product_of_halves is not None:
        internals.product_of_halves(out, dz, matrix, out.dtype, beta=0, out=out)
    else:
        for s in _slices(matrix.shape[0], matrix.shape[1] * out.element_size()):
            out.addmm_(dz[:, s].to(out.dtype), matrix[s].to(out.dtype), beta=1 if s.start else 0)


def add_outer(total: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    """Total += dz^T x, or = where it is the first; ``total`` may be wider than the factors."""
    beta = 0 if first else 1
    if total.dtype == dz.dtype:
        total.addmm_(dz.t(), x, beta=beta)
        return
    if dz.is_cuda and internals.product_of_halves is not None:
        internals.product_of_halves(total, dz.t(), x, total.dtype, beta=beta, out=total)
        return
    for s in _slices(total.shape[0], x.shape[1] * x.element_size()):
        # float16 could overflow: nothing has been divided by the number of rows yet.
        left, right = (dz[:, s].float(), x.float()) if dz.dtype == torch.float16 else (dz[:, s], x)
        product = left.t() @ right
        total[s].copy_(product) if first else total[s].add_(product)


def add_outer_apart(total: Tensor, dz: Tensor, x: Tensor, classes: Tensor, first: bool) -> None:
    """The same, the part of the targets' classes [rows, K] by itself: it is taken out of dz [rows, C * K].

    It is nearly all of the gradient, one row for each position; so it is not rounded with the product.
    """
    positions = classes.shape[1]
    columns = classes * positions + torch.arange(positions, device=classes.device)
    values = dz.gather(1, columns).to(total.dtype)
    dz[torch.arange(dz.shape[0], device=dz.device)[:, None], columns] = 0
    add_outer(total, dz, x, first)
    for k in range(positions):
        total.index_add_(0, columns[:, k], values[:, k : k + 1] * x)
