"""Every way to misuse the public functions: the exception's type is torch's, and the text says what to do.

One row of a table for each misuse: the call, the type, and fragments of the text that name the operation, the argument,
what is needed and what came. The same call is made to torch's own function: its type must be ours, or a base of ours.
Where torch accepts the call, or raises something else, the row says why we do not follow. Whatever is refused, the
memory and the version of every operand are compared with what they were.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import seeded
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softmax_ext
from softmax_ext import cross_entropy

Call = Callable[[Callable[..., Any]], Any]


class Misuse(NamedTuple):
    call: Call  # takes the function, ours or torch's
    error: type[Exception]
    fragments: tuple[str, ...]
    torch_accepts: str = ""  # or raises another type: why we do not follow


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
NAMES = "" if TORCH >= (2, 13) else "a str names a dimension there, and an unknown name is a RuntimeError"
LATE = "" if TORCH >= (2, 14) else "raises at the call"


def randn(*shape: int) -> Tensor:
    return seeded.randn(*shape, dtype=torch.float32)


X = randn(3, 4)
Y = torch.tensor([0, 3, 2])
Q = X.softmax(1)
IMAGE = randn(2, 4, 5)
W = torch.ones(4)
F8 = torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")

INDICES = "int64 or uint8 of shape [3], or floating of the input's shape [3, 4]"
FLOATING = "float64, float32, bfloat16 or float16"
SILENT = "torch computes with the value and gives a wrong loss in silence"
OURS = "no such option in torch"
FLAG = "a flag is no amount"


def nested(*, layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor([X[0], X[1]], layout=layout)


def loss(*arguments: Any, **options: Any) -> Call:
    """A call of cross_entropy with these arguments."""
    return lambda function: function(*arguments, **options)


INPUT = {
    "list": Misuse(loss(X.tolist(), Y), TypeError, ("input must be a Tensor", "got list")),
    "array": Misuse(loss(X.cpu().numpy(), Y), TypeError, ("input must be a Tensor", "got ndarray")),
    "None": Misuse(loss(None, Y), TypeError, ("input must be a Tensor", "got NoneType")),
    "int64": Misuse(
        loss(X.long(), Y), NotImplementedError, (f"input must be {FLOATING}", "int64 [3, 4]", "input.float()")
    ),
    "swapped with classes": Misuse(loss(Y, X), NotImplementedError, ("int64 [3]", "are the two swapped?")),
    "swapped with one-hot": Misuse(
        loss(F.one_hot(Y, 4), X), NotImplementedError, ("int64 [3, 4]", "are the two swapped?")
    ),
    "bool": Misuse(loss(X.bool(), Y), NotImplementedError, ("input must be", "bool [3, 4]", "input.float()")),
    "complex": Misuse(loss(X.cfloat(), Y), NotImplementedError, ("input must be", "complex64 [3, 4]")),
    "float8": Misuse(
        loss(X.to(F8), Y), NotImplementedError, ("input must be", "float8_e4m3fn [3, 4]", "input.float()")
    ),
    "quantised": Misuse(
        lambda f: f(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), Y),
        NotImplementedError,
        ("input must be", "qint8"),
    ),
    "sparse": Misuse(
        loss(X.to_sparse(), Y), NotImplementedError, ("input must be a dense", "sparse_coo", "to_dense()")
    ),
    "csr": Misuse(lambda f: f(X.to_sparse_csr(), Y), NotImplementedError, ("input must be a dense", "sparse_csr")),
    "nested": Misuse(lambda f: f(nested(), Y[:2]), NotImplementedError, ("input must be a dense", "nested")),
    "jagged": Misuse(
        lambda f: f(nested(layout=torch.jagged), Y[:2]), NotImplementedError, ("input must be a dense", "nested")
    ),
    "0-d": Misuse(
        loss(torch.tensor(1.0), torch.tensor(0)), RuntimeError, ("input must have at least one", "float32 []")
    ),
    "meta next to CPU": Misuse(
        loss(X.to("meta"), Y),
        RuntimeError,
        ("target must be on the input's device, meta", f"got {Y.device}", "target.to(input.device)"),
    ),
}

TARGET = {
    "list": Misuse(loss(X, [0, 3, 2]), TypeError, ("target must be a Tensor", "got list")),
    "int": Misuse(loss(X[0], 2), TypeError, ("target must be a Tensor", "got int")),
    "None": Misuse(loss(X, None), TypeError, ("target must be a Tensor", "got NoneType")),
    "fewer rows": Misuse(loss(X, Y[:2]), ValueError, (f"target must be {INDICES}", "got int64 [2]")),
    "more rows": Misuse(loss(X, Y.repeat(2)), ValueError, (f"target must be {INDICES}", "got int64 [6]")),
    "column": Misuse(loss(X, Y[:, None]), RuntimeError, (f"target must be {INDICES}", "got int64 [3, 1]")),
    "rank 2": Misuse(loss(X, Y[:, None].expand(3, 2)), RuntimeError, (f"target must be {INDICES}", "got int64 [3, 2]")),
    "classes last": Misuse(
        loss(randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)),
        RuntimeError,
        ("int64 [2, 5]", "classes are dimension 1", "input.movedim(-1, 1)"),
    ),
    "rank 0": Misuse(loss(X, Y[0]), ValueError, (f"target must be {INDICES}", "got int64 []")),
    "unbatched int32": Misuse(
        loss(X[0], torch.tensor(0).int()), RuntimeError, ("target must be int64 or uint8 of shape []", "got int32 []")
    ),
    "unbatched with a matrix": Misuse(
        loss(X[0], Y[None]), RuntimeError, ("target must be int64 or uint8 of shape []", "got int64 [1, 3]")
    ),
    "two for one row": Misuse(
        loss(X[0], Y[:2]), ValueError, ("target must be int64 or uint8 of shape []", "got int64 [2]")
    ),
    "pixels": Misuse(
        loss(IMAGE, torch.zeros(2, 6).long()),
        RuntimeError,
        ("target must be int64 or uint8 of shape [2, 5]", "got int64 [2, 6]"),
    ),
    "pixels missing": Misuse(
        loss(IMAGE, Y[:2]), RuntimeError, ("target must be int64 or uint8 of shape [2, 5]", "int64 [2]")
    ),
    "pixels' batch": Misuse(
        loss(IMAGE, torch.zeros(3, 5).long()),
        ValueError,
        ("target must be int64 or uint8 of shape [2, 5]", "int64 [3, 5]"),
    ),
    "probabilities' classes": Misuse(loss(X, Q[:, :3]), RuntimeError, (f"target must be {INDICES}", "float32 [3, 3]")),
    "probabilities' rows": Misuse(loss(X, Q[:2]), ValueError, (f"target must be {INDICES}", "float32 [2, 4]")),
    "one-hot int64": Misuse(
        loss(X, F.one_hot(Y, 4)),
        RuntimeError,
        ("target must be floating (class probabilities)", "int64 [3, 4]", "target.to(input.dtype)", "target.argmax(1)"),
    ),
    "one-hot bool": Misuse(loss(X, F.one_hot(Y, 4).bool()), RuntimeError, ("target must be floating", "bool [3, 4]")),
    "one class": Misuse(loss(X[:, :1], Y[:, None]), RuntimeError, ("target must be floating", "int64 [3, 1]")),
    "int32": Misuse(loss(X, Y.int()), RuntimeError, (f"target must be {INDICES}", "int32 [3]", "Use target.long()")),
    "int16": Misuse(loss(X, Y.short()), RuntimeError, (f"target must be {INDICES}", "int16 [3]", "Use target.long()")),
    "bool": Misuse(loss(X, Y.bool()), RuntimeError, (f"target must be {INDICES}", "bool [3]", "Use target.long()")),
    "floating classes": Misuse(
        loss(X, Y.float()), RuntimeError, (f"target must be {INDICES}", "float32 [3]", "target.long()")
    ),
    "complex": Misuse(loss(X, Q.cfloat()), RuntimeError, ("target must be floating", "complex64 [3, 4]")),
    "float8": Misuse(
        loss(X, Q.to(F8)), NotImplementedError, (f"target must be {FLOATING}", "float8", "target.float()")
    ),
    "sparse classes": Misuse(loss(X, Y.to_sparse()), NotImplementedError, ("target must be a dense", "sparse_coo")),
    "sparse probabilities": Misuse(
        loss(X, Q.to_sparse()),
        NotImplementedError,
        ("target must be a dense", "to_dense()"),
        "torch makes it dense in silence",
    ),
    "nested": Misuse(lambda f: f(X, nested()), NotImplementedError, ("target must be a dense", "nested")),
    "meta": Misuse(
        loss(X, Y.to("meta")), RuntimeError, (f"target must be on the input's device, {X.device}", "got meta")
    ),
}

CLASSES = {
    "negative": Misuse(loss(X, torch.tensor([0, -1, 2])), IndexError, ("classes in [0, 4)", "got -1 at position [1]")),
    "equal to C": Misuse(loss(X, torch.tensor([0, 3, 4])), IndexError, ("classes in [0, 4)", "got 4 at position [2]")),
    "huge": Misuse(loss(X, torch.tensor([2**62, 0, 0])), IndexError, (f"got {2**62} at position [0]",)),
    "least int64": Misuse(loss(X, torch.tensor([0, -(2**63), 0])), IndexError, (f"got {-(2**63)} at position [1]",)),
    "uint8": Misuse(loss(X, torch.tensor([0, 200, 2], dtype=torch.uint8)), IndexError, ("got 200 at position [1]",)),
    "uint8 and ignore_index -1": Misuse(
        loss(X, torch.tensor([0, 255, 2], dtype=torch.uint8), ignore_index=-1),
        IndexError,
        ("ignore_index (-1)", "got 255"),
    ),
    "pixel": Misuse(
        loss(IMAGE, torch.tensor([[0] * 5, [0, 0, 0, 9, 0]])),
        IndexError,
        ("classes in [0, 4)", "got 9 at position [1, 3]"),
    ),
    "first of several": Misuse(loss(X, torch.tensor([0, 8, 9])), IndexError, ("got 8 at position [1]",)),
    "unbatched": Misuse(loss(X[0], torch.tensor(4)), IndexError, ("classes in [0, 4)", "got 4")),
    "-100 when another is ignored": Misuse(
        loss(X, torch.tensor([0, -100, 2]), ignore_index=1),
        IndexError,
        ("ignore_index (1)", "got -100 at position [1]"),
    ),
    "no classes": Misuse(loss(randn(2, 0), Y[:2]), IndexError, ("classes in [0, 0)", "got 0 at position [0]")),
}

WEIGHT = {
    "list": Misuse(loss(X, Y, [1.0] * 4), TypeError, ("weight must be a Tensor", "got list")),
    "number": Misuse(loss(X, Y, 2.0), TypeError, ("weight must be a Tensor", "got float")),
    "too long": Misuse(loss(X, Y, torch.ones(5)), RuntimeError, ("weight must have shape [4]", "got float32 [5]")),
    "2-d": Misuse(loss(X, Y, W[None]), RuntimeError, ("weight must have shape [4]", "got float32 [1, 4]")),
    "0-d": Misuse(loss(X, Y, W[0]), RuntimeError, ("weight must have shape [4]", "got float32 []")),
    "too long, probabilities": Misuse(
        loss(X, Q, torch.ones(5)), RuntimeError, ("weight must have shape [4]", "float32 [5]")
    ),
    "int64": Misuse(
        loss(X, Y, W.long()), RuntimeError, ("weight must be floating", "int64 [4]", "weight.to(input.dtype)")
    ),
    "int64, probabilities": Misuse(
        loss(X, Q, W.long()),
        RuntimeError,
        ("weight must be floating", "int64 [4]"),
        "torch refuses it with class indices",
    ),
    "bool": Misuse(loss(X, Y, W.bool()), RuntimeError, ("weight must be floating", "bool [4]")),
    "complex": Misuse(loss(X, Y, W.cfloat()), RuntimeError, ("weight must be floating", "complex64 [4]")),
    "sparse": Misuse(loss(X, Y, W.to_sparse()), NotImplementedError, ("weight must be a dense", "sparse_coo")),
    "meta": Misuse(
        loss(X, Y, W.to("meta")), RuntimeError, (f"weight must be on the input's device, {X.device}", "got meta")
    ),
    "requires grad": Misuse(
        lambda f: f(X, Y, W.clone().requires_grad_()), RuntimeError, ("weight must not require grad", "weight.detach()")
    ),
}

OPTIONS = {
    "smoothing > 1": Misuse(
        loss(X, Y, label_smoothing=1.5), RuntimeError, ("label_smoothing must be between 0.0 and 1.0", "got 1.5")
    ),
    "smoothing inf": Misuse(
        loss(X, Y, label_smoothing=INF), RuntimeError, ("label_smoothing must be between 0.0 and 1.0", "got inf")
    ),
    "smoothing < 0": Misuse(
        loss(X, Y, label_smoothing=-0.1), RuntimeError, ("label_smoothing must be between", "got -0.1"), SILENT
    ),
    "smoothing NaN": Misuse(
        loss(X, Y, label_smoothing=NAN), RuntimeError, ("label_smoothing must be between", "got nan"), SILENT
    ),
    "smoothing str": Misuse(
        loss(X, Y, label_smoothing="0.1"), TypeError, ("label_smoothing must be a number", "'0.1' (str)")
    ),
    "smoothing None": Misuse(
        loss(X, Y, label_smoothing=None), TypeError, ("label_smoothing must be a number", "got None")
    ),
    "smoothing bool": Misuse(
        loss(X, Y, label_smoothing=True), TypeError, ("label_smoothing must be a number", "True"), FLAG
    ),
    "reduction unknown": Misuse(
        loss(X, Y, reduction="max"), ValueError, ('reduction must be "mean", "sum" or "none"', "got 'max'")
    ),
    "reduction None": Misuse(loss(X, Y, reduction=None), ValueError, ("reduction must be", "got None")),
    "reduction int": Misuse(loss(X, Y, reduction=1), ValueError, ("reduction must be", "got 1")),
    "reduction list": Misuse(loss(X, Y, reduction=["mean"]), ValueError, ("reduction must be", "got ['mean']")),
    "reduction batchmean": Misuse(
        loss(X, Y, reduction="batchmean"), ValueError, ("reduction must be", "got 'batchmean'")
    ),
    "ignore_index float": Misuse(
        loss(X, Y, ignore_index=1.0), TypeError, ("ignore_index must be an int", "1.0 (float)")
    ),
    "ignore_index str": Misuse(loss(X, Y, ignore_index="1"), TypeError, ("ignore_index must be an int", "'1' (str)")),
    "ignore_index None": Misuse(loss(X, Y, ignore_index=None), TypeError, ("ignore_index must be an int", "got None")),
    "ignore_index bool": Misuse(loss(X, Y, ignore_index=True), TypeError, ("ignore_index must be an int", "got True")),
    "ignore_index beyond int64": Misuse(loss(X, Y, ignore_index=2**63), ValueError, ("ignore_index", str(2**63))),
    "ignore_index with probabilities": Misuse(
        loss(X, Q, ignore_index=0),
        RuntimeError,
        ("ignore_index must be negative with a target of probabilities", "got 0"),
    ),
    "z_loss < 0": Misuse(
        loss(X, Y, z_loss=-1.0), ValueError, ("z_loss must be finite and not negative", "got -1.0"), OURS
    ),
    "z_loss NaN": Misuse(loss(X, Y, z_loss=NAN), ValueError, ("z_loss must be finite", "got nan"), OURS),
    "z_loss inf": Misuse(loss(X, Y, z_loss=INF), ValueError, ("z_loss must be finite", "got inf"), OURS),
    "z_loss None": Misuse(loss(X, Y, z_loss=None), TypeError, ("z_loss must be a number", "got None"), OURS),
    "denominator str": Misuse(
        loss(X, Y, denominator="3"), TypeError, ("denominator must be a number", "'3' (str)"), OURS
    ),
    "denominator bool": Misuse(loss(X, Y, denominator=True), TypeError, ("denominator must be a number", "True"), OURS),
    "denominator complex": Misuse(loss(X, Y, denominator=3j), TypeError, ("denominator must be a number", "3j"), OURS),
    "denominator bool tensor": Misuse(
        loss(X, Y, denominator=torch.tensor(True)), TypeError, ("denominator must be a number or", "got bool []"), OURS
    ),
    "denominator complex tensor": Misuse(
        loss(X, Y, denominator=torch.tensor(3j)), TypeError, ("denominator must be a number", "got complex64 []"), OURS
    ),
    "denominator of three": Misuse(
        loss(X, Y, denominator=torch.ones(3)), ValueError, ("denominator must have one element", "float32 [3]"), OURS
    ),
    "denominator of none": Misuse(
        loss(X, Y, denominator=torch.ones(0)), ValueError, ("denominator must have one element", "float32 [0]"), OURS
    ),
    "denominator sparse": Misuse(
        loss(X, Y, denominator=torch.ones(1).to_sparse()), NotImplementedError, ("denominator must be a dense",), OURS
    ),
    "denominator meta": Misuse(
        loss(X, Y, denominator=torch.ones((), device="meta")),
        RuntimeError,
        ("denominator must be on the input's device, cpu", "got meta", "Use denominator.to(input.device)"),
        OURS,
    ),
    "denominator requires grad": Misuse(
        loss(X, Y, denominator=torch.nn.Parameter(torch.tensor(2.0))),
        TypeError,
        ("denominator must have no derivative", "a tensor that is differentiated", "Use denominator.detach()"),
        OURS,
    ),
    "denominator none": Misuse(
        loss(X, Y, denominator=3, reduction="none"),
        ValueError,
        ('denominator must be None with reduction="none"',),
        OURS,
    ),
    "denominator none deprecated": Misuse(
        loss(X, Y, denominator=3, reduce=False), ValueError, ('denominator must be None with reduction="none"',), OURS
    ),
    "row_weight text": Misuse(
        loss(X, Y, row_weight="p"),
        ValueError,
        ('row_weight must be a Tensor, "probability" or None', "got 'p'"),
        OURS,
    ),
    "row_weight probability of probabilities": Misuse(
        loss(X, X.softmax(1), row_weight="probability"),
        ValueError,
        ("row_weight must be a Tensor or None with a target of probabilities", "got 'probability'"),
        OURS,
    ),
    "row_weight number": Misuse(
        loss(X, Y, row_weight=0.5), TypeError, ("row_weight must be a Tensor,", "got 0.5 (float)"), OURS
    ),
    "row_weight list": Misuse(
        loss(X, Y, row_weight=[1.0, 1.0, 1.0]), TypeError, ("row_weight must be a Tensor,", "(list)"), OURS
    ),
    "row_weight one": Misuse(
        loss(X, Y, row_weight=torch.ones(1)),
        RuntimeError,
        ("row_weight must have shape [3], one value for each row", "got float32 [1]"),
        OURS,
    ),
    "row_weight of classes": Misuse(
        loss(X, Y, row_weight=torch.ones(4)), RuntimeError, ("row_weight must have shape [3]", "got float32 [4]"), OURS
    ),
    "row_weight int": Misuse(
        loss(X, Y, row_weight=torch.ones(3, dtype=torch.int64)),
        RuntimeError,
        ("row_weight must be floating", "got int64 [3]", "Use row_weight.to(input.dtype)"),
        OURS,
    ),
    "row_weight bool": Misuse(
        loss(X, Y, row_weight=torch.ones(3, dtype=torch.bool)),
        RuntimeError,
        ("row_weight must be floating", "got bool [3]"),
        OURS,
    ),
    "row_weight sparse": Misuse(
        loss(X, Y, row_weight=torch.ones(3).to_sparse()), NotImplementedError, ("row_weight must be a dense",), OURS
    ),
    "row_weight meta": Misuse(
        loss(X, Y, row_weight=torch.ones(3, device="meta")),
        RuntimeError,
        ("row_weight must be on the input's device, cpu", "got meta", "Use row_weight.to(input.device)"),
        OURS,
    ),
    "row_weight requires grad": Misuse(
        loss(X, Y, row_weight=torch.nn.Parameter(torch.ones(3))),
        TypeError,
        ("row_weight must have no derivative", "a tensor that is differentiated", "Use row_weight.detach()"),
        OURS,
    ),
    "softcap < 0": Misuse(
        loss(X, Y, softcap=-1.0), ValueError, ("softcap must be finite and positive", "got -1.0"), OURS
    ),
    "softcap NaN": Misuse(
        loss(X, Y, softcap=NAN), ValueError, ("softcap must be finite and positive", "got nan"), OURS
    ),
    "softcap inf": Misuse(loss(X, Y, softcap=INF), ValueError, ("softcap must be finite", "or None", "got inf"), OURS),
    "softcap no float32": Misuse(loss(X, Y, softcap=1e-50), ValueError, ("softcap must be", "got 1e-50"), OURS),
    "softcap subnormal": Misuse(
        loss(X, Y, softcap=1e-39, logit_scale=1e-3), ValueError, ("softcap must be", "got 1e-39"), OURS
    ),
    "softcap str": Misuse(loss(X, Y, softcap="30"), TypeError, ("softcap must be a number", "'30' (str)"), OURS),
    "logit_scale NaN": Misuse(loss(X, Y, logit_scale=NAN), ValueError, ("logit_scale must be finite", "got nan"), OURS),
    "logit_scale inf": Misuse(loss(X, Y, logit_scale=INF), ValueError, ("logit_scale must be finite", "got inf"), OURS),
    "logit_scale parameter": Misuse(
        loss(X, Y, logit_scale=torch.nn.Parameter(torch.tensor(2.0))),
        TypeError,
        ("logit_scale must be a number", "differentiated", "logit_scale.item()"),
    ),
    "logit_scale flag": Misuse(loss(X, Y, logit_scale=torch.tensor(True)), TypeError, ("must be a number", "bool []")),
    "logit_scale meta": Misuse(
        loss(X, Y, logit_scale=torch.tensor(2.0, device="meta")), TypeError, ("must be a number", "on meta")
    ),
    "ignore_index float tensor": Misuse(
        loss(X, Y, ignore_index=torch.tensor(1.0)), TypeError, ("ignore_index must be an int", "float32 []")
    ),
    "logit_scale None": Misuse(loss(X, Y, logit_scale=None), TypeError, ("logit_scale must be a number", "None"), OURS),
    "dtype int64": Misuse(
        loss(X, Y, dtype=torch.int64), NotImplementedError, (f"dtype must be {FLOATING[:20]}", "torch.int64"), OURS
    ),
    "dtype float8": Misuse(loss(X, Y, dtype=F8), NotImplementedError, ("dtype must be", "torch.float8_e4m3fn"), OURS),
    "dtype str": Misuse(loss(X, Y, dtype="float32"), TypeError, ("dtype must be", "'float32'"), OURS),
    "dtype positional": Misuse(
        loss(X, Y, None, None, -100, None, "mean", 0.0, torch.float32), TypeError, ("positional",)
    ),
    "unknown": Misuse(loss(X, Y, smoothing=0.1), TypeError, ("unexpected keyword argument 'smoothing'",)),
    "no target": Misuse(loss(X), TypeError, ("target",)),
}


def computed() -> Tensor:
    """Logits that may be written over: neither a leaf nor a view."""
    return X.clone().requires_grad_() * 1


LEAF = X.clone().requires_grad_()

INPLACE = {
    "leaf": Misuse(
        loss(LEAF, Y, inplace=True), ValueError, ("input must not be a leaf that requires grad", "inplace=False"), OURS
    ),
    "leaf, precomputed": Misuse(
        loss(LEAF, Y, inplace=True, precompute_grad=True),
        ValueError,
        ("input must not be a leaf", "inplace=False"),
        OURS,
    ),
    "view of a leaf": Misuse(
        loss(LEAF[:2], Y[:2], inplace=True), ValueError, ("input must not be a leaf", "a view of one"), OURS
    ),
    "expanded": Misuse(
        lambda f: f(computed()[:1].expand(3, 4), Y, inplace=True),
        ValueError,
        ("input must not have overlapping elements", "shape [3, 4] with strides [0, 1]", "input.contiguous()"),
        OURS,
    ),
    "overlapping windows": Misuse(
        lambda f: f(computed().flatten().unfold(0, 4, 2)[:3], Y, inplace=True),
        ValueError,
        ("input must not have overlapping elements", "with strides [2, 1]"),
        OURS,
    ),
    "negated view": Misuse(
        lambda f: f(torch._neg_view(computed()), Y, inplace=True), ValueError, ("lazily negated", "resolve_neg()"), OURS
    ),
    "target that requires grad": Misuse(
        lambda f: f(computed(), Q.clone().requires_grad_(), inplace=True),
        ValueError,
        ("target must not require grad if inplace=True", "target.detach()"),
        OURS,
    ),
    "class": Misuse(
        lambda f: f(computed(), Y + 2, inplace=True, precompute_grad=True), IndexError, ("got 5 at position [1]",), OURS
    ),
    "weight": Misuse(
        lambda f: f(computed(), Y, torch.ones(5), inplace=True), RuntimeError, ("weight must have shape [4]",), OURS
    ),
}

SOFTMAX = {
    "list": Misuse(loss(X.tolist(), 1), TypeError, ("input must be a Tensor", "got list"), "AttributeError there"),
    "dim str": Misuse(loss(X, "C"), TypeError, ("dim must be an int", "'C' (str)"), NAMES),
    "dim float": Misuse(loss(X, 1.0), TypeError, ("dim must be an int", "1.0 (float)")),
    "dim bool": Misuse(loss(X, True), TypeError, ("dim must be an int", "True (bool)")),
    "dim tuple": Misuse(loss(X, (0, 1)), TypeError, ("dim must be an int", "(0, 1) (tuple)")),
    "dim too high": Misuse(loss(X, 2), IndexError, ("dim must lie in [-2, 1]", "got 2")),
    "dim too low": Misuse(loss(X, -3), IndexError, ("dim must lie in [-2, 1]", "got -3")),
    "dim of a 0-d": Misuse(loss(torch.tensor(1.0), 1), IndexError, ("dim must lie in [-1, 0]", "got 1")),
    "int64": Misuse(
        loss(X.long(), 1), NotImplementedError, (f"input must be {FLOATING}", "int64 [3, 4]", "input.float()")
    ),
    "bool": Misuse(loss(X.bool(), 1), NotImplementedError, ("input must be", "bool [3, 4]")),
    "complex": Misuse(loss(X.cfloat(), 1), NotImplementedError, ("input must be", "complex64 [3, 4]")),
    "float8": Misuse(loss(X.to(F8), 1), NotImplementedError, ("input must be", "float8_e4m3fn [3, 4]")),
    "dtype int64": Misuse(loss(X, 1, dtype=torch.int64), NotImplementedError, ("dtype must be float64", "torch.int64")),
    "dtype bool": Misuse(loss(X, 1, dtype=torch.bool), NotImplementedError, ("dtype must be float64", "torch.bool")),
    "dtype complex": Misuse(
        loss(X, 1, dtype=torch.cfloat), NotImplementedError, ("dtype must be float64", "complex64")
    ),
    "dtype float8": Misuse(loss(X, 1, dtype=F8), NotImplementedError, ("dtype must be float64", "torch.float8_e4m3fn")),
    "dtype str": Misuse(loss(X, 1, dtype="float32"), TypeError, ("dtype must be", "'float32'")),
    "complex with dtype": Misuse(
        loss(X.cfloat(), 1, dtype=torch.float32),
        NotImplementedError,
        ("input must be", "complex64"),
        "drops the imaginary part",
    ),
    "sparse": Misuse(
        loss(X.to_sparse(), 1), NotImplementedError, ("input must be a dense", "sparse_coo", "to_dense()")
    ),
    "csr": Misuse(lambda f: f(X.to_sparse_csr(), 1), NotImplementedError, ("input must be a dense", "sparse_csr")),
    "quantised": Misuse(
        lambda f: f(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), 1),
        NotImplementedError,
        ("input must be", "qint8"),
    ),
    "unknown": Misuse(loss(X, 1, axis=1), TypeError, ("unexpected keyword argument 'axis'",)),
}

TABLES = {
    "input": INPUT,
    "target": TARGET,
    "class": CLASSES,
    "weight": WEIGHT,
    "option": OPTIONS,
    "inplace": INPLACE,
}
CROSS_ENTROPY = {f"{argument}: {name}": row for argument, table in TABLES.items() for name, row in table.items()}

# Of linear_cross_entropy: logits X M^T [3, 5].
M = randn(5, 4)
P = randn(3, 5).softmax(1)
B5, W5 = torch.ones(5), torch.ones(5)
INDICES5 = "int64 or uint8 of shape [3], or floating of the input's shape [3, 5]"
BATCHES = "torch takes no further dimensions of the input"

LINEAR = {
    "input list": Misuse(loss(X.tolist(), M, Y), TypeError, ("input must be a Tensor", "got list"), "AttributeError"),
    "input 0-d": Misuse(
        loss(torch.tensor(1.0), M, Y), RuntimeError, ("input must have shape (..., in_features)", "got float32 []")
    ),
    "input int64": Misuse(loss(X.long(), M, Y), NotImplementedError, (f"input must be {FLOATING}", "got int64 [3, 4]")),
    "input complex": Misuse(loss(X.cfloat(), M, Y), NotImplementedError, ("input must be", "got complex64 [3, 4]")),
    "input float8": Misuse(loss(X.to(F8), M, Y), NotImplementedError, ("input must be", "got float8_e4m3fn [3, 4]")),
    "input quantised": Misuse(
        lambda f: f(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), M, Y),
        NotImplementedError,
        ("input must be", "qint8"),
    ),
    "input sparse": Misuse(
        loss(X.to_sparse(), M, Y), NotImplementedError, ("input must be a dense", "got sparse_coo"), "torch multiplies"
    ),
    "input nested": Misuse(
        lambda f: f(nested(), M, Y[:2]), NotImplementedError, ("input must be a dense", "got nested")
    ),
    "input meta": Misuse(
        loss(X.to("meta"), M, Y), RuntimeError, ("linear_weight must be on the input's device, meta", f"got {X.device}")
    ),
    "linear_weight list": Misuse(
        loss(X, M.tolist(), Y), TypeError, ("linear_weight must be a Tensor", "got list"), "AttributeError"
    ),
    "linear_weight None": Misuse(
        loss(X, None, Y), TypeError, ("linear_weight must be a Tensor", "got NoneType"), "AttributeError"
    ),
    "linear_weight 1-d": Misuse(
        loss(X, M[0], Y), RuntimeError, ("linear_weight must have shape (num_classes, in_features)", "got float32 [4]")
    ),
    "linear_weight's features": Misuse(
        loss(X, M[:, :3], Y), RuntimeError, ("linear_weight must have the input's last size, 4", "got float32 [5, 3]")
    ),
    "linear_weight transposed": Misuse(
        loss(X, M.T, Y), RuntimeError, ("linear_weight must have the input's last size, 4", "got float32 [4, 5]")
    ),
    "linear_weight float64": Misuse(
        loss(X, M.double(), Y),
        RuntimeError,
        ("linear_weight must have the input's dtype, float32", "got float64 [5, 4]", "autocast"),
    ),
    "linear_weight int64": Misuse(
        loss(X, M.long(), Y), NotImplementedError, ("linear_weight must be", "got int64 [5, 4]")
    ),
    "linear_weight sparse": Misuse(
        loss(X, M.to_sparse(), Y),
        NotImplementedError,
        ("linear_weight must be a dense", "got sparse_coo"),
        "torch multiplies",
    ),
    "linear_weight meta": Misuse(
        loss(X, M.to("meta"), Y),
        RuntimeError,
        (f"linear_weight must be on the input's device, {X.device}", "got meta"),
        "torch returns a loss without a value",
    ),
    "linear_weight 3-d, one input": Misuse(
        loss(X[0], randn(5, 2, 4), Y[0]), RuntimeError, ("input must have shape (N, 4)", "got float32 [4]")
    ),
    "linear_bias list": Misuse(
        loss(X, M, Y, linear_bias=[1.0] * 5), TypeError, ("linear_bias must be a Tensor", "got list"), "AttributeError"
    ),
    "linear_bias too short": Misuse(
        loss(X, M, Y, linear_bias=B5[:4]), RuntimeError, ("linear_bias must have shape [5]", "got float32 [4]")
    ),
    "linear_bias 2-d": Misuse(
        loss(X, M, Y, linear_bias=B5[None]), RuntimeError, ("linear_bias must have shape [5]", "got float32 [1, 5]")
    ),
    "linear_bias float64": Misuse(
        loss(X, M, Y, linear_bias=B5.double()),
        RuntimeError,
        ("linear_bias must have the input's dtype, float32", "got float64 [5]"),
    ),
    "linear_bias meta": Misuse(
        loss(X, M, Y, linear_bias=B5.to("meta")),
        RuntimeError,
        ("linear_bias must be on the input's device", "got meta"),
    ),
    "target list": Misuse(loss(X, M, [0, 3, 2]), TypeError, ("target must be a Tensor", "got list"), "AttributeError"),
    "target too short": Misuse(loss(X, M, Y[:2]), ValueError, (f"target must be {INDICES5}", "got int64 [2]")),
    "target int32": Misuse(
        loss(X, M, Y.int()), RuntimeError, (f"target must be {INDICES5}", "got int32 [3]", "target.long()")
    ),
    "target floating classes": Misuse(
        loss(X, M, Y.float()), RuntimeError, (f"target must be {INDICES5}", "got float32 [3]", "target.long()")
    ),
    "target one-hot": Misuse(
        loss(X, M, F.one_hot(Y, 5)),
        RuntimeError,
        ("target must be floating (class prob", "got int64 [3, 5]", "target.argmax(-1)"),
    ),
    "target's classes": Misuse(
        loss(X, M, P[:, :4]), RuntimeError, (f"target must be {INDICES5}", "got float32 [3, 4]")
    ),
    "target meta": Misuse(loss(X, M, Y.to("meta")), RuntimeError, ("target must be on the input's device", "got meta")),
    "target sparse": Misuse(loss(X, M, Y.to_sparse()), NotImplementedError, ("target must be a dense", "sparse_coo")),
    "target of another batch": Misuse(
        loss(X.expand(2, 3, 4), M, Y), ValueError, ("target must have shape [2, 3]", "got int64 [3]"), BATCHES
    ),
    "probabilities of another batch": Misuse(
        loss(X.expand(2, 3, 4), M, P), RuntimeError, ("target must have shape [2, 3]", "got float32 [3, 5]")
    ),
    "probabilities of other classes, a batch": Misuse(
        loss(X.expand(2, 3, 4), M, P[:, :4].expand(2, 3, 4)), RuntimeError, ("or [2, 3, 5] (probabilities)",)
    ),
    "probabilities of a batch, flattened": Misuse(
        loss(X.expand(2, 3, 4), M, P.repeat(2, 1)), RuntimeError, ("or [2, 3, 5] (probabilities)", "float32 [6, 5]")
    ),
    "probabilities' rows": Misuse(loss(X, M, P[:2]), ValueError, (f"target must be {INDICES5}", "got float32 [2, 5]")),
    "probabilities of one row": Misuse(loss(X[0], M, P[0, :4]), RuntimeError, ("target must be", "got float32 [4]")),
    "class negative": Misuse(loss(X, M, Y - 1), IndexError, ("classes in [0, 5)", "got -1 at position [0]")),
    "class equal to C": Misuse(loss(X, M, Y + 2), IndexError, ("classes in [0, 5)", "got 5 at position [1]")),
    "class -100 when another is ignored": Misuse(
        loss(X, M, torch.tensor([0, -100, 2]), ignore_index=1),
        IndexError,
        ("ignore_index (1)", "got -100 at position [1]"),
    ),
    "weight list": Misuse(loss(X, M, Y, weight=[1.0] * 5), TypeError, ("weight must be a Tensor", "got list")),
    "weight too short": Misuse(
        loss(X, M, Y, weight=W5[:4]), RuntimeError, ("weight must have shape [5]", "got float32 [4]")
    ),
    "weight int64": Misuse(loss(X, M, Y, weight=W5.long()), RuntimeError, ("weight must be floating", "got int64 [5]")),
    "weight meta": Misuse(
        loss(X, M, Y, weight=W5.to("meta")), RuntimeError, ("weight must be on the input's device", "got meta")
    ),
    "weight requires grad": Misuse(
        lambda f: f(X, M, Y, weight=W5.clone().requires_grad_()), RuntimeError, ("weight must not require grad",)
    ),
    "reduction": Misuse(loss(X, M, Y, reduction="avg"), ValueError, ("reduction must be", "got 'avg'")),
    "reduction None": Misuse(loss(X, M, Y, reduction=None), ValueError, ("reduction must be", "got None")),
    "ignore_index float": Misuse(
        loss(X, M, Y, ignore_index=1.5), TypeError, ("ignore_index must be an int", "got 1.5 (float)")
    ),
    "ignore_index with probabilities": Misuse(
        loss(X, M, P, ignore_index=2), RuntimeError, ("ignore_index must be None with a target of prob", "got 2")
    ),
    "smoothing > 1": Misuse(
        loss(X, M, Y, label_smoothing=1.5), RuntimeError, ("label_smoothing must be between 0.0 and 1.0", "got 1.5")
    ),
    "smoothing NaN": Misuse(
        loss(X, M, Y, label_smoothing=NAN), RuntimeError, ("label_smoothing must be between", "got nan"), SILENT
    ),
    "dtype int32": Misuse(
        loss(X, M, Y, dtype=torch.int32), NotImplementedError, ("dtype must be float64", "got torch.int32"), OURS
    ),
    "z_loss < 0": Misuse(loss(X, M, Y, z_loss=-1.0), ValueError, ("z_loss must be finite", "got -1.0"), OURS),
    "softcap < 0": Misuse(loss(X, M, Y, softcap=-1.0), ValueError, ("softcap must be finite", "got -1.0"), OURS),
    "denominator bool": Misuse(loss(X, M, Y, denominator=True), TypeError, ("denominator must be a number",), OURS),
    "denominator of three": Misuse(
        loss(X, M, Y, denominator=torch.ones(3)), ValueError, ("denominator must have one element",), OURS
    ),
    "denominator none": Misuse(
        loss(X, M, Y, denominator=3, reduction="none"), ValueError, ("denominator must be None with",), OURS
    ),
    "denominator requires grad": Misuse(
        loss(X, M, Y, denominator=torch.nn.Parameter(torch.tensor(2.0))), TypeError, ("Use denominator.detach()",), OURS
    ),
    "logit_scale NaN": Misuse(loss(X, M, Y, logit_scale=NAN), ValueError, ("logit_scale must be", "got nan"), OURS),
    "chunk_rows 0": Misuse(loss(X, M, Y, chunk_rows=0), ValueError, ("chunk_rows must be at least 1", "got 0"), OURS),
    "chunk_rows < 0": Misuse(loss(X, M, Y, chunk_rows=-8), ValueError, ("chunk_rows must be", "got -8"), OURS),
    "chunk_rows float": Misuse(loss(X, M, Y, chunk_rows=0.5), TypeError, ("chunk_rows must be an int", "0.5"), OURS),
    "chunk_rows bool": Misuse(loss(X, M, Y, chunk_rows=True), TypeError, ("chunk_rows must be an int", "True"), OURS),
    "memory float": Misuse(loss(X, M, Y, memory=1e9), TypeError, ("memory must be an int", "1000000000.0"), OURS),
    "memory bool": Misuse(loss(X, M, Y, memory=True), TypeError, ("memory must be an int", "True"), OURS),
    "memory < 0": Misuse(loss(X, M, Y, memory=-1), ValueError, ("memory must not be negative", "got -1"), OURS),
    "memory too small": Misuse(loss(X, M, Y, memory=19), ValueError, ("memory must be at least 20 bytes", "19"), OURS),
    "memory and chunk_rows": Misuse(
        loss(X, M, Y, memory=1 << 20, chunk_rows=2), ValueError, ("memory must be None with chunk_rows",), OURS
    ),
    "positional option": Misuse(loss(X, M, Y, B5), TypeError, ("positional argument",)),
    "unknown": Misuse(loss(X, M, Y, inplace=True), TypeError, ("unexpected keyword argument 'inplace'",)),
    "no target": Misuse(loss(X, M), TypeError, ("target",)),
}


# Where a class is wrong, torch's CUDA kernels end the process's use of the GPU, and their types are not the CPU's.
TORCH_IS_ASKED = not X.is_cuda


def raised(call: Call, function: Callable[..., Any]) -> Exception | None:
    try:
        call(function)
    except Exception as error:
        return error
    return None


def parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that hold what a tensor of any layout holds."""
    if tensor.is_meta:
        return []
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout == torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor]


def memory(tensors: list[Tensor]) -> list[tuple[int, list[Tensor]]]:
    """The version of each and a copy of all its memory, also of what lies between its elements."""

    def storage(part: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(part.untyped_storage()).clone()

    return [(tensor._version, [storage(part) for part in parts(tensor)]) for tensor in tensors]


def watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; it also asserts that no tensor among its arguments was touched."""

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        before = memory(tensors)
        try:
            return function(*args, **kwargs)
        finally:
            for (old_version, old), (version, new) in zip(before, memory(tensors), strict=True):
                assert version == old_version
                assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))

    return call


def check(row: Misuse, ours: Any, theirs: Any, prefix: str) -> None:
    """Ours and torch's functions, or packages of modules; ``prefix``: what a text may begin with, as a pattern."""
    error = raised(row.call, ours)
    assert type(error) is row.error, repr(error)
    text = str(error)
    if "argument" not in text and "cannot assign" not in text:  # Python's and torch's word on signatures and buffers
        assert re.match(rf"({prefix}): ", text), text
    for fragment in row.fragments:
        assert fragment in text, text
    if not TORCH_IS_ASKED or theirs is None:
        return
    reference = raised(row.call, theirs)
    if row.torch_accepts is OURS:
        assert "unexpected keyword argument" in str(reference)
    elif row.torch_accepts:
        assert not isinstance(error, type(reference)), f"torch raises the same: {reference!r}"
    else:
        assert reference is not None, "torch accepts this"
        assert isinstance(error, type(reference)), f"torch raises {reference!r}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", CROSS_ENTROPY.values(), ids=CROSS_ENTROPY)
def test_cross_entropy(row):
    check(row, watched(cross_entropy), F.cross_entropy, "cross_entropy")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", LINEAR.values(), ids=LINEAR)
def test_linear_cross_entropy(row):
    """Torch's own is new in 2.13."""
    theirs = getattr(F, "linear_cross_entropy", None)
    check(row, watched(softmax_ext.linear_cross_entropy), theirs, "linear_cross_entropy")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("row", SOFTMAX.values(), ids=SOFTMAX)
def test_softmax(row, name):
    check(row, watched(getattr(softmax_ext, name)), getattr(F, name), name)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_of_nested_tensors(name, layout):
    """Torch has kernels for some of these cases, and an internal error for others."""
    with pytest.raises(NotImplementedError, match=rf"{name}: input must be a dense .* nested.*pad it"):
        getattr(softmax_ext, name)(nested(layout=layout), 1)


class Watched:
    """The package, as far as it makes modules: their calls are watched."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: watched(getattr(softmax_ext, name)(*args, **kwargs))


# The call takes the package: ours, or torch.nn.
MODULES = {
    "CrossEntropyLoss reduction": Misuse(
        lambda m: m.CrossEntropyLoss(reduction="max")(X, Y), ValueError, ("reduction must be", "got 'max'")
    ),
    "CrossEntropyLoss smoothing": Misuse(
        lambda m: m.CrossEntropyLoss(label_smoothing=2)(X, Y),
        RuntimeError,
        ("label_smoothing must be between", "got 2"),
    ),
    "CrossEntropyLoss weight list": Misuse(
        lambda m: m.CrossEntropyLoss(weight=[1.0] * 4), TypeError, ("weight", "cannot assign")
    ),
    "CrossEntropyLoss weight length": Misuse(
        lambda m: m.CrossEntropyLoss(torch.ones(5))(X, Y), RuntimeError, ("weight must have shape [4]", "float32 [5]")
    ),
    "CrossEntropyLoss weight meta": Misuse(
        lambda m: m.CrossEntropyLoss(W.to("meta"))(X, Y), RuntimeError, ("weight must be on the input's", "got meta")
    ),
    "CrossEntropyLoss class": Misuse(
        lambda m: m.CrossEntropyLoss()(X, Y + 2), IndexError, ("classes in [0, 4)", "got 5 at position [1]")
    ),
    "CrossEntropyLoss target": Misuse(
        lambda m: m.CrossEntropyLoss()(X, Y.int()), RuntimeError, ("target must be", "int32 [3]", "target.long()")
    ),
    "CrossEntropyLoss input": Misuse(
        lambda m: m.CrossEntropyLoss()(X.long(), Y), NotImplementedError, ("input must be", "int64 [3, 4]")
    ),
    "CrossEntropyLoss inplace": Misuse(
        lambda m: m.CrossEntropyLoss(inplace=True)(LEAF, Y), ValueError, ("must not be a leaf", "inplace=False"), OURS
    ),
    "CrossEntropyLoss softcap": Misuse(
        lambda m: m.CrossEntropyLoss(softcap=-1.0)(X, Y), ValueError, ("softcap must be", "got -1.0"), OURS
    ),
    "CrossEntropyLoss unknown": Misuse(
        lambda m: m.CrossEntropyLoss(smoothing=0.1), TypeError, ("unexpected keyword argument 'smoothing'",)
    ),
    "Softmax dim": Misuse(lambda m: m.Softmax(2)(X), IndexError, ("dim must lie in [-2, 1]", "got 2")),
    "Softmax dim str": Misuse(lambda m: m.Softmax("C")(X), TypeError, ("dim must be an int", "'C' (str)"), NAMES),
    "LogSoftmax dim str": Misuse(lambda m: m.LogSoftmax("C"), TypeError, ("dim must be an int", "'C' (str)"), LATE),
    "Softmax input": Misuse(lambda m: m.Softmax(1)(X.long()), NotImplementedError, ("input must be", "int64 [3, 4]")),
    "LogSoftmax dim": Misuse(lambda m: m.LogSoftmax(-3)(X), IndexError, ("dim must lie in [-2, 1]", "got -3")),
    "LogSoftmax input": Misuse(lambda m: m.LogSoftmax(1)(X.bool()), NotImplementedError, ("input must be", "bool")),
}

LINEAR_MODULES = {
    "features": Misuse(
        lambda m: m.LinearCrossEntropyLoss(3, 5)(X, Y), RuntimeError, ("the input's last size, 4", "got float32 [5, 3]")
    ),
    "features not an int": Misuse(
        lambda m: m.LinearCrossEntropyLoss("3", 5), TypeError, ("argument", "must be tuple of ints")
    ),
    "input 0-d": Misuse(
        lambda m: m.LinearCrossEntropyLoss(4, 5)(torch.tensor(1.0), Y), RuntimeError, ("input must have shape", "[]")
    ),
    "dtype": Misuse(
        lambda m: m.LinearCrossEntropyLoss(4, 5, dtype=torch.float64)(X, Y),
        RuntimeError,
        ("linear_weight must have the input's dtype, float32", "got float64 [5, 4]"),
    ),
    "device": Misuse(
        lambda m: m.LinearCrossEntropyLoss(4, 5, device="meta")(X, Y),
        RuntimeError,
        ("linear_weight must be on the input's device", "got meta"),
        "torch returns a loss without a value",
    ),
    "class": Misuse(
        lambda m: m.LinearCrossEntropyLoss(4, 5)(X, Y + 2), IndexError, ("classes in [0, 5)", "got 5 at position [1]")
    ),
    "weight length": Misuse(
        lambda m: m.LinearCrossEntropyLoss(4, 5, weight=W)(X, Y), RuntimeError, ("weight must have shape [5]", "[4]")
    ),
    "smoothing": Misuse(
        lambda m: m.LinearCrossEntropyLoss(4, 5, label_smoothing=2.0)(X, Y),
        RuntimeError,
        ("label_smoothing must be between", "got 2.0"),
    ),
    "reduction": Misuse(
        lambda m: m.LinearCrossEntropyLoss(4, 5, reduction="max")(X, Y), ValueError, ("reduction must be", "got 'max'")
    ),
    "chunk_rows": Misuse(
        lambda m: m.LinearCrossEntropyLoss(4, 5, chunk_rows=0)(X, Y), ValueError, ("chunk_rows must be", "got 0"), OURS
    ),
    "unknown": Misuse(
        lambda m: m.LinearCrossEntropyLoss(4, 5, smoothing=0.1), TypeError, ("unexpected keyword argument 'smoothing'",)
    ),
}

OPERATIONS = "cross_entropy|linear_cross_entropy|softmax|log_softmax"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", MODULES.values(), ids=MODULES)
def test_modules(row):
    check(row, Watched(), nn, OPERATIONS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", LINEAR_MODULES.values(), ids=LINEAR_MODULES)
def test_linear_module(row):
    check(row, Watched(), nn if hasattr(nn, "LinearCrossEntropyLoss") else None, "linear_cross_entropy")


# ---- bad classes ---------------------------------------------------------------------------------------------------

STRATEGIES = [{}, {"precompute_grad": True}, {"inplace": True}, {"inplace": True, "precompute_grad": True}]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (5, 40), (5, 4, 3)], ids=str)
def test_bad_class_is_found_before_any_write(shape, return_stats, strategy):
    """The bad class is the last, the rows before it are fine: none of them may have been touched."""
    logits = randn(*shape).requires_grad_() * 2
    before, version = logits.detach().clone(), logits._version
    target = torch.zeros(5, *shape[2:], dtype=torch.int64)
    target.view(-1)[-1] = shape[1]
    position = ", ".join(str(n - 1) for n in target.shape)
    with pytest.raises(IndexError, match=re.escape(f"got {shape[1]} at position [{position}].")):
        cross_entropy(logits, target, return_stats=return_stats, **strategy)
    assert torch.equal(logits, before)
    assert logits._version == version
    target.view(-1)[-1] = 0
    cross_entropy(logits, target, **strategy).backward()  # and the logits are as good as before


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_first_bad_class_of_many_rows(dtype):
    """Rows are scanned in parallel groups; the one that is named is the first of them all."""
    target = torch.zeros(100_000, dtype=dtype)
    target[70_001] = 9
    target[99_999] = 8
    with pytest.raises(IndexError, match=r"got 9 at position \[70001\]"):
        cross_entropy(randn(1, 4).expand(100_000, 4), target)


def test_bad_class_in_a_strided_target():
    """The position is the tensor's, not the memory's."""
    target = torch.zeros(5, 2, dtype=torch.int64).T  # [2, 5]
    target[1, 3] = 7
    with pytest.raises(IndexError, match=r"got 7 at position \[1, 3\]"):
        cross_entropy(IMAGE, target)


def test_bad_class_changed_after_the_forward():
    """Backward reads the target again, so that it must check it again: never out of bounds."""
    x, target = X.clone().requires_grad_(), Y.clone()
    value = cross_entropy(x, target)
    target.untyped_storage().copy_(torch.tensor([0, 10**6, 0]).untyped_storage())  # behind autograd's back
    with pytest.raises((IndexError, RuntimeError), match="1000000"):
        value.backward()


# ---- what must not be refused --------------------------------------------------------------------------------------

ACCEPTED = {
    "numpy float32": {"label_smoothing": np.float32(0.25)},
    "numpy float64": {"label_smoothing": np.float64(0.25)},
    "an int": {"label_smoothing": 1},
    "numpy int64": {"ignore_index": np.int64(3)},
    "numpy int32": {"ignore_index": np.int32(3)},
}


@pytest.mark.parametrize("options", ACCEPTED.values(), ids=ACCEPTED)
def test_numbers_that_torch_takes(options):
    torch.testing.assert_close(cross_entropy(X, Y, **options), F.cross_entropy(X, Y, **options))


@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16, torch.tensor])
def test_numbers_of_every_kind(number):
    """Every option that is a number may be numpy's or a tensor of rank 0."""
    integer = torch.tensor if number is torch.tensor else np.int64
    amounts = {"label_smoothing": 0.125, "z_loss": 0.25, "softcap": 3.0, "logit_scale": 0.5}
    given = {name: number(value) for name, value in amounts.items()}
    for x in (X, X.clone().requires_grad_()):
        ours = cross_entropy(x, Y, ignore_index=integer(2), **given)
        assert torch.equal(ours, cross_entropy(x, Y, ignore_index=2, **amounts))
        for function in (softmax_ext.softmax, softmax_ext.log_softmax):
            assert torch.equal(function(x, integer(-1)), function(x, -1))


def test_subclasses_of_tensor():
    class Labelled(Tensor):
        pass

    torch.testing.assert_close(cross_entropy(nn.Parameter(X), Y).detach(), F.cross_entropy(X, Y))
    value = cross_entropy(X.as_subclass(Labelled), Y)
    torch.testing.assert_close(value.as_subclass(Tensor), F.cross_entropy(X, Y))


# ---- an option that is differentiated ----


DIFFERENTIATED = {
    "grad": lambda f, s: torch.func.grad(f)(s),
    "jvp": lambda f, s: torch.func.jvp(f, (s,), (torch.ones_like(s),)),
    "vmap": lambda f, s: torch.func.vmap(f)(torch.stack([s, s])),
    "forward_ad": lambda f, s: _with_tangent(f, s),
    "parameter": lambda f, s: f(torch.nn.Parameter(s)),
}


def _with_tangent(function: Callable[[Tensor], Any], value: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(value, torch.ones_like(value)))


@pytest.mark.parametrize("how", sorted({*DIFFERENTIATED} - {"vmap"}))
@pytest.mark.parametrize("linear", [False, True])
def test_a_denominator_has_no_derivative(how, linear):
    def function(value: Tensor) -> Tensor:
        if linear:
            return softmax_ext.linear_cross_entropy(X, torch.eye(4), Y, denominator=value)
        return cross_entropy(X, Y, denominator=value)

    with pytest.raises(TypeError, match="denominator must have no derivative"):
        DIFFERENTIATED[how](function, torch.tensor(0.5))


@pytest.mark.parametrize("how", sorted({*DIFFERENTIATED} - {"vmap"}))
def test_a_row_weight_has_no_derivative(how):
    def function(value: Tensor) -> Tensor:
        return cross_entropy(X, Y, row_weight=value.expand(3))

    with pytest.raises(TypeError, match="row_weight must have no derivative"):
        DIFFERENTIATED[how](function, torch.tensor(0.5))


@pytest.mark.parametrize("how", DIFFERENTIATED)
@pytest.mark.parametrize("option", ["label_smoothing", "z_loss", "softcap", "logit_scale"])
@pytest.mark.parametrize("linear", [False, True])
def test_an_option_has_no_derivative(how, option, linear):
    """It is read as a number: a derivative in it would be 0 in silence."""

    def function(value: Tensor) -> Tensor:
        if linear:
            return softmax_ext.linear_cross_entropy(X, torch.eye(4), Y, **{option: value})
        return cross_entropy(X, Y, **{option: value})

    with pytest.raises(TypeError, match=f"{option} must be a number"):
        DIFFERENTIATED[how](function, torch.tensor(0.5))


def test_an_option_may_be_a_detached_tensor():
    assert cross_entropy(X, Y, logit_scale=torch.tensor(0.5)) == cross_entropy(X, Y, logit_scale=0.5)


# ---- sentences of torch's that code may look for --------------------------------------------------------------------

SENTENCES: dict[str, tuple[str, Call]] = {
    "class": ("Target 7 is out of bounds.", loss(X, torch.tensor([0, 7, 2]))),
    "probabilities": (
        "Expected floating point type for target with class probabilities",
        loss(X, F.one_hot(Y, 4)),
    ),
    "smoothing": ("label_smoothing must be between 0.0 and 1.0", loss(X, Y, label_smoothing=1.5)),
    "reduction": ("max is not a valid value for reduction", loss(X, Y, reduction="max")),
}


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(("sentence", "call"), SENTENCES.values(), ids=SENTENCES)
def test_sentences_of_torchs(sentence, call):
    def linear(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        return softmax_ext.linear_cross_entropy(input, torch.eye(4), target, **options)

    for function in (F.cross_entropy, softmax_ext.cross_entropy, linear):
        with pytest.raises((IndexError, RuntimeError, ValueError)) as caught:
            call(function)
        assert sentence in str(caught.value)


def test_a_softcap_of_zero_is_none():
    for function in (
        softmax_ext.cross_entropy,
        lambda x, y, **o: softmax_ext.linear_cross_entropy(x, torch.eye(4), y, **o),
    ):
        assert function(X.cpu(), Y.cpu(), softcap=0.0) == function(X.cpu(), Y.cpu())
