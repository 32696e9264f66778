"""The right answers in float64 NumPy, and how far from them a variant may be before its time is worth nothing.

The mean loss is computed over all rows, gradients and softmax on some, evenly spaced. For one row x, with
b_c = w_c ((1 - smoothing) q_c + smoothing / C), q the target's distribution, and p = softmax(x):

    loss = sum_c b_c (lse - x_c)        dloss/dx_c = p_c sum b - b_c

both divided by sum w_y over the rows not ignored (by the number of rows for probabilities).
"""

from dataclasses import dataclass

import numpy as np
from cases import FORWARD, LOG_SOFTMAX, LOSS, SOFTMAX, Case
from inputs import IGNORE_INDEX, Arrays

_CHECKED_ELEMENTS = 2**22
_CHUNK_ELEMENTS = 2**18

# Relative errors. bfloat16 is what eager torch needs: it rounds log-probabilities near -10 to bfloat16, 8 bits,
# before it takes their exponential, and so is off by 2**-6 to 2**-5 in a gradient.
TOLERANCE = {
    ("float32", "value"): 1e-5,
    ("float32", "gradient"): 5e-5,
    ("bfloat16", "value"): 2**-7,
    ("bfloat16", "gradient"): 2**-4,
}


def as_rows(array: np.ndarray, class_axis: int) -> np.ndarray:
    """[rows, classes] of an array with the classes anywhere."""
    return np.moveaxis(array, class_axis, -1).reshape(-1, array.shape[class_axis])


def checked_rows(case: Case) -> np.ndarray:
    """Which rows are compared: at most _CHECKED_ELEMENTS elements of them, from the first to the last."""
    count = min(case.rows, max(1, _CHECKED_ELEMENTS // case.classes))
    return np.linspace(0, case.rows - 1, count).astype(np.int64)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


class _Loss:
    """Cross entropy row by row."""

    def __init__(self, case: Case, arrays: Arrays):
        self.case, self.arrays = case, arrays
        self.logits = as_rows(arrays.logits, case.class_axis)
        self.target = as_rows(arrays.target, case.class_axis) if case.probabilities else arrays.target.reshape(-1)
        self.weight = np.ones(case.classes) if arrays.weight is None else arrays.weight.astype(np.float64)
        if case.probabilities:
            self.denominator = float(case.rows)
        else:
            self.denominator = self.weight[self.target[self.target != IGNORE_INDEX]].sum()

    def _mass(self, rows: slice | np.ndarray) -> np.ndarray:
        """B of the formula, [rows, classes]."""
        target, smoothing = self.target[rows], self.arrays.label_smoothing
        if self.case.probabilities:
            return self.weight * ((1 - smoothing) * target.astype(np.float64) + smoothing / self.case.classes)
        kept = target != IGNORE_INDEX
        mass = np.full((len(target), self.case.classes), smoothing / self.case.classes)
        mass[np.flatnonzero(kept), target[kept]] += 1 - smoothing
        return mass * self.weight * kept[:, None]

    def mean(self) -> float:
        """The mean loss over all rows, a chunk at a time."""
        step = max(1, _CHUNK_ELEMENTS // self.case.classes)
        chunks = [slice(start, start + step) for start in range(0, self.case.rows, step)]
        total = sum(self._sum(chunk) for chunk in chunks)
        return total / self.denominator

    def _sum(self, rows: slice) -> float:
        log_p = _log_softmax(self.logits[rows].astype(np.float64))
        if self.case.plain:  # b picks one class
            return -float(log_p[np.arange(len(log_p)), self.target[rows]].sum())
        return -float((self._mass(rows) * log_p).sum())

    def gradient(self, rows: np.ndarray) -> np.ndarray:
        mass = self._mass(rows)
        p = np.exp(_log_softmax(self.logits[rows].astype(np.float64)))
        return (p * mass.sum(1, keepdims=True) - mass) / self.denominator


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, each relative to its own expected value or the second largest of its row.

    The second: beside the one of the target's class all other gradients are small, and an error in them must show.
    """
    if actual.shape != expected.shape:
        return np.inf
    size = np.abs(expected)
    scale = np.maximum(size, np.partition(size, -2, axis=1)[:, -2:-1]) if size.shape[1] > 1 else size
    error = np.abs(actual.astype(np.float64) - expected)
    relative = np.divide(error, scale, out=np.where(error == 0, 0.0, np.inf), where=scale > 0)
    return float(np.where(np.isnan(relative), np.inf, relative).max(initial=0.0))


@dataclass
class Expected:
    """What a variant must give: a value (the loss, or rows of a softmax) and rows of the logits' gradient."""

    dtype: str
    value: np.ndarray  # [1, 1] the loss, or [checked rows, classes]
    gradient: np.ndarray | None

    def complaint(self, value: np.ndarray, gradient: np.ndarray | None) -> str:
        """Says what is wrong; "" if nothing is."""
        compared = [("value", value, self.value)]
        if self.gradient is not None:
            compared.append(("gradient", gradient, self.gradient))
        for quantity, actual, expected in compared:
            error, allowed = relative_error(actual, expected), TOLERANCE[self.dtype, quantity]
            if not error <= allowed:
                return f"{quantity} off by {error:.2g} (relative to float64; at most {allowed:.2g} is allowed)"
        return ""


def expect(what: str, case: Case, arrays: Arrays, upstream: np.ndarray | None) -> Expected:
    """The right answers of a case; ``upstream`` is what softmax and log_softmax get from behind."""
    rows = checked_rows(case)
    if what in (LOSS, FORWARD):
        loss = _Loss(case, arrays)
        value = np.array([[loss.mean()]])
        return Expected(case.dtype, value, loss.gradient(rows) if what == LOSS else None)
    log_p = _log_softmax(as_rows(arrays.logits, case.class_axis)[rows].astype(np.float64))
    g = as_rows(upstream, case.class_axis)[rows].astype(np.float64)
    p = np.exp(log_p)
    if what == SOFTMAX:
        return Expected(case.dtype, p, p * (g - (p * g).sum(1, keepdims=True)))
    assert what == LOG_SOFTMAX
    return Expected(case.dtype, log_p, g - p * g.sum(1, keepdims=True))
