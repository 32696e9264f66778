"""Measures how close two training runs are, by the losses of their steps, which are float32 numbers."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Agreement:
    """How close the losses of two runs are, step by step."""

    difference: np.ndarray  # [steps], the other run's loss minus the baseline's
    spacing: np.ndarray  # [steps], between the baseline's loss and the next larger float32
    relative: np.ndarray  # [steps], the size of the difference divided by the baseline's loss

    @classmethod
    def of(cls, baseline: list[float], other: list[float]) -> "Agreement":
        expected = np.array(baseline)
        difference = np.array(other) - expected
        spacing = np.spacing(expected.astype(np.float32)).astype(float)
        return cls(difference, spacing, np.abs(difference) / expected)

    @property
    def spacings(self) -> np.ndarray:
        """The differences counted in float32 spacings; the smallest difference of two losses is 1."""
        return self.difference / self.spacing

    def in_words(self) -> str:
        steps = len(self.difference)
        equal = int((self.difference == 0).sum())
        if equal == steps:
            return f"the same loss to the last bit at each of {steps} steps"
        return (
            f"the same loss to the last bit at {equal} of {steps} steps; at the others apart by"
            f" at most {np.abs(self.difference).max():.2g} (relative: {self.relative.max():.2g}; in"
            f" float32 spacings: {np.abs(self.spacings).max():.0f})"
        )
