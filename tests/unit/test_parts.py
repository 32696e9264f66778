"""Cross entropy from parts of the classes: the operators that sum a part, merge parts, and take a part's gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from softmax_ext import ops
from softmax_ext.options import MEAN, NONE, SUM, Options
from softmax_ext.reference import Rows, merged_state

INF = torch.inf


def _options(reduction=NONE, **changes) -> Options:
    plain = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "logit_scale": 1.0}
    return Options(1, reduction, **{**plain, **changes})


def _cut(classes: int, *cuts: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise((0, *cuts, classes)))


def _parts(x, target, weight, options, cuts, stats=False, dtype=None):
    """The parts of the rows of x, cut where ``cuts`` says."""
    parts = []
    for begin, end in cuts:
        of_part = target[:, begin:end] if target.is_floating_point() else target
        arguments = (*options, dtype, stats, begin, x.shape[1])
        parts.append(ops.cross_entropy_part(x[:, begin:end], of_part, weight, *arguments))
    return torch.stack(parts)


def _accumulated(x, target, weight, options, cuts, stats=False, dtype=None):
    """The same merged one after the other, [1, fields, *batch]."""
    part = None
    for begin, end in cuts:
        of_part = target[:, begin:end] if target.is_floating_point() else target
        arguments = (*options, dtype, stats, begin, x.shape[1], part)
        part = ops.cross_entropy_part(x[:, begin:end], of_part, weight, *arguments)
    return part.unsqueeze(0)


def _merged(x, target, weight, options, cuts, stats=False, dtype=None, denominator=None):
    """The results from the parts, merged all at once, and the same one after the other."""
    wide = torch.float64 in (x.dtype, dtype, target.dtype)
    indices = None if target.is_floating_point() else target
    arguments = (indices, weight, *options, dtype or x.dtype, wide, stats, denominator, x.shape[1])
    at_once, accumulated = (
        ops.cross_entropy_of_parts(parts(x, target, weight, options, cuts, stats, dtype), *arguments)
        for parts in (_parts, _accumulated)
    )
    for one, other in zip(at_once, accumulated, strict=True):
        assert_close(one, other, rtol=1e-14 if wide else 1e-6, atol=0, equal_nan=True)
    return at_once


CASES = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "options": {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 5.0, "logit_scale": 0.7},
    "negative scale": {"logit_scale": -1.5, "z_loss": 0.1},
}
CUTS = {"one": (), "three": (40, 130), "single classes": (1, 2, 199), "many": tuple(range(10, 200, 10))}


def _inputs(device, dtype=torch.float64, probabilities=False, positions=(), weight=True):
    generator = torch.Generator().manual_seed(7)
    x = (4 * torch.randn(13, 200, *positions, generator=generator)).to(device, dtype)
    if probabilities:
        target = torch.rand(13, 200, *positions, generator=generator).softmax(1).to(device, dtype)
    else:
        target = torch.randint(0, 200, (13, *positions), generator=generator)
        target[3] = -100
        target = target.to(device)
    weights = torch.rand(200, generator=generator).to(device) if weight else None
    return x, target, weights


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("positions", [(), (3,)])
def test_results_and_gradients_of_parts(device, cuts, case, weighted, probabilities, positions):
    x, target, weight = _inputs(device, torch.float64, probabilities, positions, weighted)
    for reduction, stats in ((NONE, True), (MEAN, False), (SUM, False)):
        options = _options(reduction, **case)
        expected = ops.cross_entropy(x, target, weight, *options, None, stats, False)
        cut = _cut(200, *cuts)
        found = _merged(x, target, weight, options, cut, stats)
        assert len(found) == len(expected)
        for ours, whole in zip(found, expected, strict=True):
            if not probabilities and ours.dim() and ours.shape[0] in (2, 13):  # an ignored row has no state
                live = target != -100
                if ours.shape[1:] == live.shape:
                    ours, whole = ours[:, live], whole[:, live]
            assert_close(ours, whole, rtol=1e-12, atol=1e-12)
        upstream = [torch.rand_like(expected[0])] + (
            [torch.rand_like(t) for t in expected[3:6]] if stats else [None] * 3
        )
        entropy = expected[5] if stats else None
        total = found[2]
        whole = ops.cross_entropy_backward(
            *upstream, x, target, weight, expected[1], total, entropy, *options, True, probabilities
        )
        for begin, end in cut:
            of_part = target[:, begin:end] if probabilities else target
            part = x[:, begin:end]
            arguments = (*upstream, part, of_part, weight, found[1], total, entropy, *options)
            for of_one, of_all in zip(
                ops.cross_entropy_backward(*arguments, True, probabilities, begin, 200), whole, strict=True
            ):
                if of_one.numel():
                    assert_close(of_one, of_all[:, begin:end], rtol=1e-11, atol=1e-12)
            over = part.clone()
            ops.cross_entropy_backward_(*upstream, over, *arguments[5:], begin, 200)
            assert_close(over, whole[0][:, begin:end], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [200, 5000])
def test_precision_of_peaked_rows(device, dtype, classes):
    """p - 1 and the loss keep their relative precision where one class has nearly all the mass, wherever it lies."""
    x = torch.full((classes, classes), -20.0, dtype=dtype, device=device)[:12]
    rows = torch.arange(12, device=device)
    target = rows * (classes // 12)
    x[rows, target] = 4
    options, cut = _options(), _cut(classes, classes // 3, classes // 2)
    loss, state, total = _merged(x, target, None, options, cut, dtype=torch.float32)
    rest = (classes - 1) * torch.exp(torch.tensor(-24.0, dtype=torch.float64))
    assert_close(loss.double(), rest.log1p().expand(12).to(device), rtol=1e-6, atol=0)
    for begin, end in cut:
        of_part = torch.ones_like(loss)
        arguments = (of_part, None, None, None, x[:, begin:end], target, None, state, total, None, *options)
        gradient, _ = ops.cross_entropy_backward(*arguments, True, False, begin, classes)
        inside = (target >= begin) & (target < end)
        at_target = gradient[inside, target[inside] - begin].double()
        expected = (-rest / (1 + rest)).expand(int(inside.sum())).to(device)
        assert_close(at_target, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


SPECIAL = {
    "part of -inf": [-INF, -INF, 1.0, 2.0],
    "last part of -inf": [1.0, 2.0, -INF, -INF],
    "all -inf": [-INF] * 4,
    "inf": [0.0, INF, 1.0, 2.0],
    "two inf": [0.0, INF, INF, 2.0],
    "nan": [0.0, 1.0, torch.nan, 2.0],
    "nan after -inf": [-INF, -INF, torch.nan, 2.0],
    "nan among -inf": [-INF, torch.nan, 1.0, 2.0],
    "inf before nan": [INF, 1.0, torch.nan, 2.0],
    "inf with nan": [INF, torch.nan, INF, torch.nan],
    "equal": [3.0, 3.0, 3.0, 3.0],
    "far apart": [-8e37, 0.0, 8e37, 0.0],
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("row", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("columns", [False, True])
def test_special_logits(device, row, columns, smoothing):
    """A row of parts is what the whole row is: -inf, NaN and infinities, loss, statistics and prediction."""
    x = torch.tensor(row, device=device).repeat(4, 1)
    if columns:  # rows in the lanes
        x = x.t().contiguous().t()
    target = torch.arange(4, device=device)
    options = _options(label_smoothing=smoothing)
    expected = ops.cross_entropy(x, target, None, *options, None, True, False)
    for cut in ([(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 3), (3, 4)]):
        loss, _, _, *statistics = _merged(x, target, None, options, cut, stats=True)
        assert_close(loss, expected[0], equal_nan=True)
        for ours, whole in zip(statistics, expected[3:], strict=True):
            assert_close(ours, whole, equal_nan=True)


@pytest.mark.parametrize("row", SPECIAL.values(), ids=SPECIAL)
def test_the_plain_formula_of_the_merge(device, row):
    x, target = torch.tensor(row, dtype=torch.float64, device=device).repeat(2, 1), torch.zeros(2, dtype=torch.int64)
    for cut in ([(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 4)]):
        parts = _parts(x, target.to(device), None, _options(), cut)
        max, rest = merged_state(parts[:, 0], parts[:, 1])
        _, state, _ = ops.cross_entropy(x, target.to(device), None, *_options(), None, False, False)
        assert_close(rest, state[1], rtol=1e-14, atol=0, equal_nan=True)
        assert_close(max[rest.isfinite()], state[0][rest.isfinite()], rtol=0, atol=0)


def test_the_plain_formula_can_be_differentiated():
    max = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rest = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *state: merged_state(*state), (max, rest))


def test_ignored_rows_have_no_gradient(device):
    x, target, weight = _inputs(device)
    x[3] = torch.nan
    options = _options(SUM)
    loss, state, total = _merged(x, target, weight, options, _cut(200, 100))
    assert loss.isfinite()
    gradient = x.clone()
    for begin, end in _cut(200, 100):
        one = torch.ones_like(loss)
        part = gradient[:, begin:end]
        ops.cross_entropy_backward_(
            one, None, None, None, part, target, weight, state, total, None, *options, begin, 200
        )
    assert not gradient[3].any()
    assert gradient.isfinite().all()


def test_a_denominator(device):
    x, target, weight = _inputs(device)
    denominator = torch.tensor(17.0, dtype=torch.float64, device=device)
    whole = ops.cross_entropy(x, target, weight, *_options(MEAN), None, False, False, denominator)
    found = _merged(x, target, weight, _options(MEAN), _cut(200, 70), denominator=denominator)
    assert_close(found[0], whole[0])
    assert found[2].item() == 17


def test_no_rows(device):
    x = torch.empty(0, 200, device=device)
    target = torch.empty(0, dtype=torch.int64, device=device)
    for reduction, expected in ((SUM, 0.0), (MEAN, torch.nan)):
        loss, *_ = _merged(x, target, None, _options(reduction), _cut(200, 70))
        assert_close(loss.item(), expected, equal_nan=True)


def test_parts_against_the_formulas(device):
    """float32 rows of parts against the plain formulas in float64."""
    x, target, weight = _inputs(device, torch.float32)
    options = _options(label_smoothing=0.1, z_loss=0.01)
    rows = Rows(x.double(), target, weight.double(), options)
    loss, *_ = _merged(x, target, weight, options, _cut(200, 3, 150))
    assert_close(loss.double(), rows.loss(), rtol=1e-6, atol=1e-6)


def test_bytes_as_classes(device):
    x, target, _ = _inputs(device, weight=False)
    target = target.clamp(0).byte()
    expected = ops.cross_entropy(x, target, None, *_options(), None, False, False)[0]
    assert_close(_merged(x, target, None, _options(), _cut(200, 70))[0], expected)


@pytest.mark.parametrize(
    ("begin", "classes", "text"),
    [
        (-1, 200, "a row has 200 classes; got 100 from class -1 on"),
        (150, 200, "got 100 from class 150 on"),
        (2**63 - 1, 200, "got 100 from class 9223372036854775807 on"),
        (0, -5, "a row has -5 classes"),
    ],
)
def test_a_range_outside_the_row_is_refused(device, begin, classes, text):
    x, target = torch.zeros(2, 100, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=text):
        ops.cross_entropy_part(x, target, None, *_options(), None, False, begin, classes)
    parts = torch.zeros(1, 3, 2, dtype=torch.float64, device=device)
    if classes < 0:
        with pytest.raises(RuntimeError, match=text):
            ops.cross_entropy_of_parts(parts, target, None, *_options(), torch.float32, False, False, None, classes)


def test_parts_of_other_options_are_refused(device):
    x, target, weight = _inputs(device)
    parts = _parts(x, target, weight, _options(), _cut(200, 100))
    with pytest.raises(RuntimeError, match="these options make parts of 5 fields; got 3"):
        ops.cross_entropy_of_parts(
            parts, target, weight, *_options(label_smoothing=0.1), torch.float64, True, False, None, 200
        )
