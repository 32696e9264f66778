"""The matrix products of a linear layer and of its gradients, each by the library that is fastest and rounds least."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import internals

# A product that needs a temporary tensor is computed in slices of this size, which stay in cache.
_SLICE_BYTES = 2 << 20
# A sum over fewer classes at a time would spend its time on the result.
_LEAST_CLASSES = 256


@cache
def _amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def prefers_onednn(device: str, dtype: torch.dtype, features: int) -> bool:
    """Whether X W^T is computed by oneDNN. The alternative, ``torch.mm``, calls MKL, which is slow in float32 on AMD.

    This is a fixed rule and not a measurement, so that the bits are the same every time. The other two products are not
    computed by oneDNN: MKL is nearly as fast there, and the errors of its dZ W are a third smaller.
    """
    is_float = device == "cpu" and dtype == torch.float32
    has_onednn = internals.onednn_linear is not None and torch.backends.mkldnn.is_available()
    return is_float and features > 0 and has_onednn and _amd()


def _onednn(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    assert internals.onednn_linear is not None
    return internals.onednn_linear(x, matrix, bias, "none", [], "")


def _step(bytes_each: int) -> int:
    return max(_SLICE_BYTES // max(bytes_each, 1), 1)


def _converted_step(rows: int, bytes_each: int) -> int:
    """The classes of a slice for which factors are converted to float32, those of dz [rows, C] too."""
    return max(min(_step(bytes_each), 4 * _step(4 * rows)), _LEAST_CLASSES)


def _step_of_sum(features: int) -> int:
    """The rows of a product that are added to a float32 sum at a time."""
    return max(_step(4 * features) // 8, 1)


def _slices(size: int, bytes_each: int) -> Iterator[slice]:
    return _cut(size, _step(bytes_each))


def _cut(size: int, step: int) -> Iterator[slice]:
    return (slice(begin, min(begin + step, size)) for begin in range(0, size, step))


def project(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes x matrix^T + bias into ``out``: x [rows, D], matrix [C, D], bias [C] or None, out [rows, C].

    ``out`` may have a wider dtype than the factors; then nothing is rounded to theirs.
    """
    if out.dtype != x.dtype:
        _project_widely(x, matrix, bias, out)
    elif prefers_onednn(x.device.type, x.dtype, x.shape[-1]):
        # oneDNN allocates its result; with slices malloc can use the same memory again.
        for s in _slices(matrix.shape[0], x.shape[0] * x.element_size()):
            out[:, s] = _onednn(x, matrix[s], None if bias is None else bias[s])
    elif bias is None:
        torch.mm(x, matrix.t(), out=out)
    else:
        torch.addmm(bias, x, matrix.t(), out=out)


def _project_widely(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if x.is_cuda and internals.product_of_halves is not None:
        internals.product_of_halves(out, x, matrix.t(), out.dtype, beta=0, out=out)
        if bias is not None:
            out += bias
        return
    wide = x.to(out.dtype)
    for s in _cut(matrix.shape[0], _converted_step(x.shape[0], x.shape[1] * out.element_size())):
        of_slice = None if bias is None else bias[s].to(out.dtype)
        out[:, s] = torch.nn.functional.linear(wide, matrix[s].to(out.dtype), of_slice)


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The contiguous ``values`` [rows, columns] rounded to ``dtype``, in the front of their own memory if it differs.

    The rows move forward, twice as many at a time, into memory that has been read already.
    """
    if values.dtype == dtype:
        return values
    rows, columns = values.shape
    result = values.view(dtype).flatten()[: rows * columns].view(rows, columns)
    result[:1] = values[:1].to(dtype)
    begin = 1
    while begin < rows:
        end = min(2 * begin, rows)
        result[begin:end] = values[begin:end]
        begin = end
    return result


def _put(total: Tensor, product: Tensor, first: bool) -> None:
    """Writes or adds a slice of a product; adds some rows at a time, as torch copies them in the sum's dtype before."""
    if first:
        total.copy_(product)
        return
    for s in _cut(product.shape[0], _step_of_sum(product.shape[1])):
        total[s].add_(product[s])


def add_product(total: Tensor, dz: Tensor, matrix: Tensor, first: bool) -> None:
    """Adds dz matrix to ``total`` [rows, D], or writes it there if it is the first: dz [rows, C], matrix [C, D].

    ``total`` may have a wider dtype than the factors.
    """
    beta = 0 if first else 1
    if total.dtype == dz.dtype:
        total.addmm_(dz, matrix, beta=beta)
    elif dz.is_cuda and internals.product_of_halves is not None:
        internals.product_of_halves(total, dz, matrix, total.dtype, beta=beta, out=total)
    elif dz.dtype == torch.float16:  # a product in float16 could overflow
        for s in _cut(matrix.shape[0], _converted_step(dz.shape[0], matrix.shape[1] * total.element_size())):
            total.addmm_(dz[:, s].to(total.dtype), matrix[s].to(total.dtype), beta=1 if s.start else beta)
    else:
        for s in _slices(total.shape[0], total.shape[1] * dz.element_size()):
            product = dz[s] @ matrix
            _put(total[s], product, first)
            del product  # before the next one is made


def add_product_apart(total: Tensor, dz: Tensor, matrix: Tensor, index: Tensor, classes: int, first: bool) -> None:
    """Does the same as ``add_product``, but adds the parts of the targets' classes by themselves, in float32.

    The half-precision product would round these parts, which are nearly all of the gradient. ``index`` [rows, K] has
    the targets, of which only those in [0, classes) are in dz [rows, classes * K]. They are set to zero there.
    """
    found = []
    for k in range(index.shape[1]):
        rows = ((index[:, k] >= 0) & (index[:, k] < classes)).nonzero().squeeze(1)
        columns = index[rows, k] * index.shape[1] + k
        found.append((rows, columns, dz[rows, columns].to(total.dtype)))
        dz[rows, columns] = 0
    add_product(total, dz, matrix, first)
    # In no more memory than a slice of the product: a row of the matrix takes three times that with its multiple.
    step = max(min(_step(total.shape[1] * dz.element_size()), total.shape[0]) // 3, 1)
    for rows, columns, values in found:
        for begin in range(0, rows.numel(), step):
            s = slice(begin, begin + step)
            total.index_add_(0, rows[s], values[s, None] * matrix[columns[s]])


def add_outer(total: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    """Adds dz^T x to ``total`` [C, D], or writes it there if it is the first.

    dz is [rows, C] and x [rows, D]. ``total`` may have a wider dtype than the factors.
    """
    beta = 0 if first else 1
    if total.dtype == dz.dtype:
        total.addmm_(dz.t(), x, beta=beta)
        return
    if dz.is_cuda and internals.product_of_halves is not None:
        internals.product_of_halves(total, dz.t(), x, total.dtype, beta=beta, out=total)
        return
    if dz.dtype == torch.float16:
        # A product in float16 could overflow, because nothing has been divided by the number of rows yet.
        x = x.to(total.dtype)
        step = _converted_step(dz.shape[0], x.shape[1] * dz.element_size())
        for s in _cut(total.shape[0], step):
            total[s].addmm_(dz[:, s].to(total.dtype).t(), x, beta=beta)
        return
    buffer = x.new_empty(min(_step(x.shape[1] * x.element_size()), total.shape[0]), x.shape[1])
    for s in _slices(total.shape[0], x.shape[1] * x.element_size()):
        product = torch.mm(dz[:, s].t(), x, out=buffer[: s.stop - s.start])
        _put(total[s], product, first)


def add_outer_apart(total: Tensor, dz: Tensor, x: Tensor, classes: Tensor, first: bool) -> None:
    """Does the same as ``add_outer``, but adds the entries of the targets' classes [rows, K] by themselves, in float32.

    The half-precision product would round these entries, which are nearly all of the gradient. They are set to zero in
    dz [rows, C * K].
    """
    positions = classes.shape[1]
    columns = classes * positions + torch.arange(positions, device=classes.device)
    values = dz.gather(1, columns).to(total.dtype)
    dz[torch.arange(dz.shape[0], device=dz.device)[:, None], columns] = 0
    add_outer(total, dz, x, first)
    for k in range(positions):
        for s in _slices(x.shape[0], x.shape[1] * total.element_size()):
            total.index_add_(0, columns[s, k], values[s, k : k + 1] * x[s])


def projecting_bytes(rows: int, features: int, classes: int, device: str) -> int:
    """The most memory that ``project`` takes besides, where its result is float32 and its factors are of half types."""
    if device != "cpu" and internals.product_of_halves is not None:
        return 0
    of_slice = min(_converted_step(rows, features * 4), classes) * (rows + features) * 4
    return rows * features * 4 + of_slice


def scratch_bytes(
    rows: int,
    features: int,
    classes: int,
    dtype: torch.dtype,
    total: torch.dtype,
    device: str,
    by_classes: bool = False,
) -> int:
    """The most memory that one of the products takes besides its factors and its result.

    Args:
        rows: those of a chunk.
        features: D.
        classes: those of a chunk.
        dtype: that of the factors.
        total: the dtype in which a gradient is added up over the chunks.
        device: its type.
        by_classes: whether that is dz matrix; otherwise it is dz^T x.
    """
    size = total.itemsize
    if prefers_onednn(device, dtype, features):  # ``project``
        return min(_step(rows * size), classes) * rows * size
    if device != "cpu" or total == dtype:
        return 0
    if dtype == torch.float16:  # ``add_product``; ``add_outer``
        of_product = min(_converted_step(rows, features * size), classes) * (rows + features) * size
        of_sum = min(_converted_step(rows, features * dtype.itemsize), classes)
        return max(of_product, (features + of_sum) * rows * size)
    narrow, wide = features * dtype.itemsize, features * size  # the product; the targets' part
    results = rows if by_classes else classes
    of_sum = min(_step(narrow), results) * narrow + min(_step_of_sum(features), results) * wide
    return of_sum if by_classes else max(of_sum, min(_step(wide), rows) * wide)
