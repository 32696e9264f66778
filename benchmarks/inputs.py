"""The arrays of a case in NumPy, the same for every peer: logits, target, class weights, a gradient for softmax.

Logits are normal. A block of a prime number of them is repeated, which costs no more than writing memory does; two
rows start at different places of it.
"""

from dataclasses import dataclass

import numpy as np
from cases import IGNORED_SHARE, SMOOTHING, Case

_BLOCK = 1048583
IGNORE_INDEX = -100


@dataclass
class Arrays:
    """The arrays of one case, all as they lie in memory (Case.memory_shape)."""

    logits: np.ndarray  # float32, holding values of the case's dtype
    target: np.ndarray  # int64, without the classes; or float32 probabilities
    weight: np.ndarray | None  # [classes] float32
    label_smoothing: float


def to_bfloat16_values(array: np.ndarray) -> np.ndarray:
    """float32 rounded to what bfloat16 can hold, halves to even."""
    bits = array.view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def block(case: Case, seed: int) -> np.ndarray:
    """The float32 values that are repeated, of the case's dtype."""
    values = np.random.default_rng(seed).standard_normal(_BLOCK, dtype=np.float32)
    return to_bfloat16_values(values) if case.dtype == "bfloat16" else values


def normals(case: Case, seed: int) -> np.ndarray:
    """float32 of the case's memory_shape, holding values of its dtype."""
    return np.resize(block(case, seed), case.memory_shape)


def _probabilities(case: Case) -> np.ndarray:
    scores = np.exp(normals(case, seed=1))
    scores /= scores.sum(case.class_axis, keepdims=True)
    return scores


def _classes(case: Case) -> np.ndarray:
    generator = np.random.default_rng(2)
    shape = case.shape[:1] + case.shape[2:]
    target = generator.integers(case.classes, size=shape)
    if case.options:
        target[generator.random(shape) < IGNORED_SHARE] = IGNORE_INDEX
    return target


def make(case: Case) -> Arrays:
    """The arrays of a case, the same at every call."""
    return Arrays(
        logits=normals(case, seed=0),
        target=_probabilities(case) if case.probabilities else _classes(case),
        weight=np.random.default_rng(3).uniform(0.5, 1.5, case.classes).astype(np.float32) if case.options else None,
        label_smoothing=SMOOTHING if case.options else 0.0,
    )
