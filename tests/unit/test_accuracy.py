"""The standard of docs/accuracy.md on smaller inputs: errors per value in ULP against 60 digits, beside torch's."""

from functools import cache

import pytest
import torch
from studies import accuracy
from studies.accuracy import GRADIENT, LOG_SOFTMAX, LOSS, MEAN_GRADIENT, MEAN_LOSS, SOFTMAX, Exact, Input, Posed

pytestmark = pytest.mark.devices("cpu")

INPUTS = {
    "random": Input(accuracy.random, 30, 200),
    "peaked": Input(accuracy.peaked, 30, 200),
    "offset": Input(accuracy.offset, 30, 200),
    "10 classes": Input(accuracy.random, 600, 10),
    "33 classes, flat": Input(accuracy.flat, 180, 33),
    "100 classes, apart": Input(accuracy.apart, 60, 100),
    "5000 classes": Input(accuracy.random, 6, 5000),
    "capped": Input(accuracy.capped, 30, 200),
}
# Of float32 and float64: half the ULPs that z - max has at 24, and a small loss by a maximum close by.
BOUND = {LOSS: 8, MEAN_LOSS: 4, GRADIENT: 20, MEAN_GRADIENT: 20, SOFTMAX: 20, LOG_SOFTMAX: 8}
CAPPED_GRADIENT = 40  # the tanh may be off by a unit, which the exponential of up to 20 makes 20
# What is rounded once is off by half a unit, but for float32's error; a precomputed mean's gradient in float16 twice.
ROUNDED_ONCE, ROUNDED_TWICE = 0.51, 1.26
VALUES = [GRADIENT, MEAN_GRADIENT, SOFTMAX, LOG_SOFTMAX]  # of which there are enough for a comparison


@cache
def posed(dtype: torch.dtype) -> list[Posed]:
    return accuracy.pose(dtype, INPUTS)


def bound(dtype: torch.dtype, cell: accuracy.Cell) -> float:
    if dtype in (torch.float64, torch.float32):
        gradient = cell.result in (GRADIENT, MEAN_GRADIENT)
        return CAPPED_GRADIENT if cell.input == "capped" and gradient else BOUND[cell.result]
    return ROUNDED_TWICE if (dtype, cell.result) == (torch.float16, MEAN_GRADIENT) else ROUNDED_ONCE


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
def test_errors_are_bounded_and_not_above_torchs(isa, dtype):
    for cell in accuracy.cells(posed(dtype)):
        assert cell.ours_max <= bound(dtype, cell), cell
        if cell.result in VALUES:
            assert cell.ours_mean <= 1.02 * cell.torch_mean + 0.01, cell
            assert cell.ours_max <= 1.1 * cell.torch_max + 0.05, cell


# ---- the measure ----


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize("value", [1.0, 1.5, -1.75, 2.0**-10, -3.0])
def test_a_neighbour_is_one_unit_off(value, dtype):
    at = torch.tensor([value], dtype=dtype)
    away = torch.nextafter(at, at.sign() * torch.inf)  # towards 0 the spacing may be half of it
    exact = Exact(at.double(), torch.zeros(1, dtype=torch.float64))
    assert accuracy.ulps(away, exact) == 1
    assert accuracy.ulps(at, exact) == 0


def test_units_below_the_normal_numbers():
    exact = Exact(torch.tensor([2.0**-20, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    actual = torch.tensor([2.0**-20 + 2.0**-24, 2.0**-24], dtype=torch.float16)
    assert torch.equal(accuracy.ulps(actual, exact), torch.ones(2, dtype=torch.float64))


def test_an_exact_result_has_more_than_float64():
    """1/3 in float64 is a third of a unit off, which float64 itself could not tell."""
    third = accuracy.mpmath.mpf(1) / 3
    with accuracy.mpmath.workdps(60):
        exact = Exact.of([accuracy.mpmath.mpf(1) / 3])
    assert accuracy.ulps(torch.tensor([float(third)], dtype=torch.float64), exact).item() == pytest.approx(1 / 3)


def test_exact_results_agree_with_a_longer_formula():
    """By 120 digits and without any shift; 1e-40 of agreement is far below what any unit can tell."""
    mp = accuracy.mpmath
    logits, target = torch.tensor([[1.5, -2.25, 4.0], [0.0, 10.0, -10.0]]), torch.tensor([2, 0])
    results = accuracy.exact_results(accuracy.Problem(logits, target))
    with mp.workdps(120):
        for row, (x, y) in enumerate(zip(logits.tolist(), target.tolist(), strict=True)):
            total = mp.fsum(mp.exp(value) for value in x)
            loss = mp.log(total) - x[y]
            p = [mp.exp(value) / total for value in x]
            right = {LOSS: [loss], SOFTMAX: p, LOG_SOFTMAX: [value - mp.log(total) for value in x]}
            right[GRADIENT] = [value - (c == y) for c, value in enumerate(p)]
            for name, values in right.items():
                high, low = (part[row * len(values) : (row + 1) * len(values)].tolist() for part in results[name])
                for value, h, rest in zip(values, high, low, strict=True):
                    assert abs((mp.mpf(h) + mp.mpf(rest)) / value - 1) < mp.mpf(2) ** -100
