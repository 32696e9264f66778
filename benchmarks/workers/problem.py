"""The arrays of a case, the right answers in float64, and how far from them a variant may be.

The formulas are written once for NumPy and torch (``xp`` is either module): the peers' environments have no torch, and
what lies on a GPU is checked there. They are the benchmark's own, since eager torch is one of those that it judges.

The mean loss is computed over all rows, gradients and softmax on some, evenly spaced. For one row x, with
b_c = w_c ((1 - smoothing) q_c + smoothing / C), q the target's distribution, and p = softmax(x):

    loss = sum_c b_c (lse - x_c)        dloss/dx_c = p_c sum b - b_c

both divided by sum w_y over the rows not ignored (by the number of rows for probabilities).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from cases import FORWARD, LOG_SOFTMAX, LOSS, SCALED, SOFTMAX, UPSTREAM, Case

IGNORE_INDEX = -100
_IGNORED_SHARE = 0.1
_SMOOTHING = 0.1
_BLOCK = 1048583
_CHECKED_ELEMENTS = 2**22
_CHUNK_ELEMENTS = {"numpy": 2**18, "torch": 2**22}  # NumPy's fit the cache

# Relative errors. bfloat16 is what eager torch needs: it rounds log-probabilities near -10 to bfloat16, 8 bits,
# before it takes their exponential, and so is off by 2**-6 to 2**-5 in a gradient.
TOLERANCE = {
    ("float32", "value"): 1e-5,
    ("float32", "gradient"): 5e-5,
    ("bfloat16", "value"): 2**-7,
    ("bfloat16", "gradient"): 2**-4,
}

Array = Any  # NumPy's or torch's


# ---- the arrays on the CPU, the same for every peer ----


@dataclass
class Arrays:
    """The arrays of one case, all as they lie in memory (Case.memory_shape)."""

    logits: Array  # in NumPy float32, holding values of the case's dtype
    target: Array  # int64, without the classes; or float32 probabilities
    weight: Array | None = None  # [classes] float32
    upstream: Array | None = None  # what softmax gets from behind, as logits
    label_smoothing: float = 0.0


def to_bfloat16_values(array: np.ndarray) -> np.ndarray:
    """float32 rounded to what bfloat16 can hold, halves to even."""
    bits = array.view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def _normals(case: Case, seed: int) -> np.ndarray:
    """A block of a prime number of them is repeated, as fast as memory is written; rows begin at different places."""
    block = np.random.default_rng(seed).standard_normal(_BLOCK, dtype=np.float32)
    return np.resize(to_bfloat16_values(block) if case.dtype == "bfloat16" else block, case.memory_shape)


def _probabilities(case: Case) -> np.ndarray:
    scores = np.exp(_normals(case, seed=1))
    scores /= scores.sum(case.class_axis, keepdims=True)
    return scores


def _classes(case: Case) -> np.ndarray:
    generator = np.random.default_rng(2)
    shape = case.shape[:1] + case.shape[2:]
    target = generator.integers(case.classes, size=shape)
    if case.options:
        target[generator.random(shape) < _IGNORED_SHARE] = IGNORE_INDEX
    return target


def make(case: Case, whats: list[str]) -> Arrays:
    """The arrays of a case, the same at every call."""
    return Arrays(
        logits=_normals(case, seed=0),
        target=_probabilities(case) if case.probabilities else _classes(case),
        weight=np.random.default_rng(3).uniform(0.5, 1.5, case.classes).astype(np.float32) if case.options else None,
        upstream=_normals(case, seed=4) if {SOFTMAX, LOG_SOFTMAX} & set(whats) else None,
        label_smoothing=_SMOOTHING if case.options else 0.0,
    )


# ---- the right answers ----


def as_rows(xp: Any, array: Array, class_axis: int) -> Array:
    """[rows, classes] of an array with the classes anywhere."""
    return xp.moveaxis(array, class_axis, -1).reshape(-1, array.shape[class_axis])


class Answers:
    """The right answers of a case."""

    def __init__(self, xp: Any, case: Case, arrays: Arrays):
        self.xp, self.case, self.arrays = xp, case, arrays
        self.logits = as_rows(xp, arrays.logits, case.class_axis)
        self.target = arrays.target.reshape(-1)
        if case.probabilities:
            self.target = as_rows(xp, arrays.target, case.class_axis)
        # At most _CHECKED_ELEMENTS elements, from the first row to the last.
        count = min(case.rows, max(1, _CHECKED_ELEMENTS // case.classes))
        self.rows = xp.asarray(xp.linspace(0, case.rows - 1, count, dtype=xp.float64), dtype=xp.int64)

    def expect(self, what: str) -> tuple[Array, Array | None]:
        """What a variant must give: the loss [1, 1], or rows of a softmax; and rows of the logits' gradient."""
        if what in (LOSS, SCALED, FORWARD):
            factor = UPSTREAM if what == SCALED else 1.0
            return factor * self._mean, None if what == FORWARD else factor * self._gradient
        log_p = self._log_p(self.rows)
        g = self._double(as_rows(self.xp, self.arrays.upstream, self.case.class_axis)[self.rows])
        p = self.xp.exp(log_p)
        if what == SOFTMAX:
            return p, p * (g - (p * g).sum(1)[:, None])
        assert what == LOG_SOFTMAX
        return log_p, g - p * g.sum(1)[:, None]

    def complaint(self, what: str, value: Array, gradient: Array | None) -> str:
        """What is wrong with the loss [1, 1] or a softmax, and the gradient, as they lie in memory; "" if nothing."""
        right_value, right_gradient = self.expect(what)
        if tuple(value.shape) != (1, 1):
            value = self.checked_rows(value)
        compared = [("value", value, right_value)]
        if right_gradient is not None:
            compared.append(("gradient", self.checked_rows(gradient), right_gradient))
        for quantity, actual, expected in compared:
            error, allowed = relative_error(self.xp, actual, expected), TOLERANCE[self.case.dtype, quantity]
            if not error <= allowed:
                return f"{quantity} off by {error:.2g} (relative to float64; at most {allowed:.2g} is allowed)"
        return ""

    def checked_rows(self, array: Array) -> Array:
        """[checked rows, classes] of an array that lies as the logits do."""
        return as_rows(self.xp, array, self.case.class_axis)[self.rows]

    def _double(self, array: Array) -> Array:
        return self.xp.asarray(array, dtype=self.xp.float64)

    def _log_p(self, rows: Array | slice) -> Array:
        shifted = self._double(self.logits[rows])
        shifted = shifted - self.xp.amax(shifted, 1)[:, None]
        return shifted - self.xp.log(self.xp.exp(shifted).sum(1))[:, None]

    @cached_property
    def _weight(self) -> Array:
        xp, weight = self.xp, self.arrays.weight
        return xp.ones(self.case.classes, dtype=xp.float64) if weight is None else self._double(weight)

    @cached_property
    def _denominator(self) -> float:
        if self.case.probabilities:
            return float(self.case.rows)
        return float(self._weight[self.target[self.target != IGNORE_INDEX]].sum())

    def _mass(self, rows: Array | slice) -> Array:
        """B of the formula, [rows, classes]."""
        xp, target, smoothing = self.xp, self.target[rows], self.arrays.label_smoothing
        if self.case.probabilities:
            q, live = self._double(target), 1.0
        else:
            live = target != IGNORE_INDEX
            q = xp.zeros((len(target), self.case.classes), dtype=xp.float64)
            q[xp.arange(len(target)), xp.where(live, target, 0)] = 1.0
            live = self._double(live)[:, None]
        return ((1 - smoothing) * q + smoothing / self.case.classes) * self._weight * live

    @cached_property
    def _mean(self) -> Array:
        """[1, 1], a chunk at a time."""
        step = max(1, _CHUNK_ELEMENTS[self.xp.__name__] // self.case.classes)
        total = sum(self._sum(slice(start, start + step)) for start in range(0, self.case.rows, step))
        return self._double(total / self._denominator).reshape(1, 1)

    def _sum(self, rows: slice) -> Array:
        log_p = self._log_p(rows)
        if self.case.plain:  # b picks one class
            return -log_p[self.xp.arange(len(log_p)), self.target[rows]].sum()
        return -(self._mass(rows) * log_p).sum()

    @cached_property
    def _gradient(self) -> Array:
        mass = self._mass(self.rows)
        return (self.xp.exp(self._log_p(self.rows)) * mass.sum(1)[:, None] - mass) / self._denominator


def relative_error(xp: Any, actual: Array, expected: Array) -> float:
    """The largest error, each relative to its own expected value or the largest but the row's largest one.

    Not to that: beside the one of the target's class all other gradients are small, and an error in them must show.
    """
    if tuple(actual.shape) != tuple(expected.shape):
        return float("inf")
    size = abs(expected)
    others = xp.where(size < xp.amax(size, 1)[:, None], size, 0.0)
    scale = xp.maximum(size, xp.amax(others, 1)[:, None])
    error = abs(xp.asarray(actual, dtype=xp.float64) - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = xp.where(error == 0, 0.0, error / scale)
    return float(xp.amax(xp.where(xp.isnan(relative), float("inf"), relative)))
