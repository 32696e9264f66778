"""Measures torch, torch.compile and softmax_ext: one job, in a process of its own. bench.py starts it.

A step is forward, backward, and dropping the gradient, which for a leaf is a new tensor at every step. The logits that
"in place" overwrites must not be a leaf: they stand for the output of a model, and are an alias of a buffer that a
Function without cost hands out, made outside the clock; the logits are copied into it anew for every sample. There may
be several leaves and buffers, which then take turns (gpu_worker.py, where they must not stay in cache).
"""

from collections.abc import Callable
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import cases
import numpy as np
import torch
import torch.nn.functional as F
import worker
from cases import Case
from inputs import Arrays
from measure import Prepare
from torch import Tensor

import softmax_ext

Loss = Callable[..., Tensor]


class _Handed(torch.autograd.Function):
    """An alias of a buffer that is no leaf."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _precomputed(*args: Any, **options: Any) -> Tensor:
    return softmax_ext.cross_entropy(*args, precompute_grad=True, **options)


def _overwriting(*args: Any, **options: Any) -> Tensor:
    return softmax_ext.cross_entropy(*args, precompute_grad=True, inplace=True, **options)


def _take_gradient(leaf: Tensor) -> Tensor | None:
    gradient, leaf.grad = leaf.grad, None
    return gradient


class TorchWorkload:
    """A case as tensors."""

    keeps_memory = False

    def __init__(self, case: Case, arrays: Arrays, upstream: np.ndarray | None):
        self.case = case
        self.logits = [self._tensor(arrays.logits)]
        self.buffers = [self.logits[0].clone()]
        self.upstream = None if upstream is None else self._view(self._tensor(upstream))
        self.target = torch.from_numpy(arrays.target)
        if case.probabilities:
            self.target = self._view(self.target)
        self.options: dict[str, Any] = {"label_smoothing": arrays.label_smoothing}
        if arrays.weight is not None:
            self.options["weight"] = torch.from_numpy(arrays.weight)
        self.one = torch.zeros((), requires_grad=True)

    @cached_property
    def leaves(self) -> list[Tensor]:
        """The logits as inputs of the loss."""
        return [self._view(logits).detach().requires_grad_() for logits in self.logits]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(getattr(torch, self.case.dtype))

    def _view(self, tensor: Tensor) -> Tensor:
        """The input's shape, of a tensor as it lies in memory."""
        return tensor.transpose(1, 2) if self.case.transposed else tensor

    # ---- the variants

    @cached_property
    def compiled(self) -> Loss:
        """Made where it is first called for: the import of the compiler takes a second."""
        return torch.compile(F.cross_entropy, dynamic=False)

    def variants(self, what: str) -> dict[str, Prepare]:
        """All that there are of it, the limits included."""
        if what in (cases.LOSS, cases.MEMORY):
            return {
                cases.EAGER: self._step(F.cross_entropy),
                cases.COMPILE: lambda calls: self._step(self.compiled)(calls),
                cases.DEFAULT: self._step(softmax_ext.cross_entropy),
                cases.PRECOMPUTE: self._step(_precomputed),
                cases.INPLACE: self._overwriting_step(_overwriting),
                cases.MUL: lambda calls: self._multiply,
            }
        if what == cases.FORWARD:
            return {
                cases.EAGER: self._value(F.cross_entropy),
                cases.COMPILE: lambda calls: self._value(self.compiled)(calls),
                cases.DEFAULT: self._value(softmax_ext.cross_entropy),
                cases.SUM: lambda calls: self._add_up,
            }
        return {
            cases.EAGER: self._softmax_step(getattr(F, what)),
            cases.DEFAULT: self._softmax_step(getattr(softmax_ext, what)),
        }

    def _step(self, loss_fn: Loss) -> Prepare:
        leaves = cycle(self.leaves)

        def call() -> tuple[Tensor, Tensor | None]:
            leaf = next(leaves)
            loss = loss_fn(leaf, self.target, **self.options)
            loss.backward()
            return loss.detach(), _take_gradient(leaf)

        return lambda calls: call

    def _overwriting_step(self, loss_fn: Loss) -> Prepare:
        def prepare(calls: int) -> Callable[[], tuple[Tensor, Tensor]]:
            for buffer, logits in zip(self.buffers, self.logits, strict=True):
                buffer.copy_(logits)
            buffers = list(islice(cycle(self.buffers), calls))
            handed = iter([(self._view(_Handed.apply(self.one, buffer)), buffer) for buffer in buffers])

            def call() -> tuple[Tensor, Tensor]:
                logits, buffer = next(handed)
                loss = loss_fn(logits, self.target, **self.options)
                loss.backward()
                return loss.detach(), self._view(buffer)

            return call

        return prepare

    def _value(self, loss_fn: Loss) -> Prepare:
        leaves = cycle(self.leaves)

        def call() -> tuple[Tensor, None]:
            with torch.no_grad():
                return loss_fn(next(leaves), self.target, **self.options), None

        return lambda calls: call

    def _softmax_step(self, function: Loss) -> Prepare:
        def call() -> tuple[Tensor, Tensor | None]:
            leaf = self.leaves[0]
            output = function(leaf, 1)
            output.backward(self.upstream)
            return output.detach(), _take_gradient(leaf)

        return lambda calls: call

    def _multiply(self) -> None:
        self.buffers[0].mul_(1.0001)

    def _add_up(self) -> None:
        self.buffers[0].sum()

    # ---- for the check

    def fetch(self, result: tuple[Tensor, Tensor | None], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The loss, or rows of a softmax, and rows of the gradient if there is one."""
        value, gradient = result
        of_rows = self._rows(value, rows) if value.dim() else np.array([[value.item()]])
        return of_rows, None if gradient is None else self._rows(gradient, rows)

    def _rows(self, tensor: Tensor, rows: np.ndarray) -> np.ndarray:
        """[rows, classes]; NumPy has no bfloat16."""
        chosen = tensor.movedim(1, -1).reshape(-1, self.case.classes)[torch.from_numpy(rows).to(tensor.device)]
        return chosen.float().cpu().numpy()


if __name__ == "__main__":
    worker.main(TorchWorkload, torch.set_num_threads)
