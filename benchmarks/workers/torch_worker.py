"""Measures torch, torch.compile and softmax_ext, on a GPU Liger-Kernel and quack too.

A step is forward, backward, and dropping the gradient, which for a leaf is a new tensor at every step. The logits that
"in place" overwrites must not be a leaf: they stand for the output of a model, and are an alias of a buffer that a
Function without cost hands out.

No variant gets logits that another has overwritten. On the CPU those that overwrite work on a buffer, into which the
logits are copied anew, outside the clock, for every sample. On a GPU all do, since another's kernel may overwrite them
where nobody expects it (Liger-Kernel's does in forward alone); there the inputs are several, drawn on the GPU, and used
in turn, so that they do not stay in cache. The limit is a copy_ of the logits there; of forward alone a sum.
"""

from collections.abc import Callable
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import cases
import numpy as np
import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor
from workers import problem, worker
from workers.measure import Prepare

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


def ours(**strategy: bool) -> Loss:
    """The loss of softmax_ext with a strategy."""
    return lambda *args, **options: softmax_ext.cross_entropy(*args, **strategy, **options)


def liger(logits: Tensor, target: Tensor) -> Tensor:
    """Liger-Kernel's loss."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, target)


def quack(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of quack."""
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, target)


def scaled(loss_fn: Loss) -> Loss:
    """The loss, whose gradient from behind is then not 1."""
    return lambda *args, **options: cases.UPSTREAM * loss_fn(*args, **options)


def _take_gradient(leaf: Tensor) -> Tensor | None:
    gradient, leaf.grad = leaf.grad, None
    return gradient


class TorchWorkload:
    """A case as tensors on the CPU: the arrays that all peers get."""

    keeps_memory = False
    uncounted_bytes = 0
    restores = False  # whether every variant gets a copy of the logits
    limit = cases.MUL

    def __init__(self, case: Case, whats: list[str]):
        made = problem.make(case, whats)
        arrays = {name: torch.from_numpy(one) for name, one in vars(made).items() if isinstance(one, np.ndarray)}
        for name in {"logits", "upstream"} & set(arrays):
            arrays[name] = arrays[name].to(getattr(torch, case.dtype))
        self._set(case, problem.Arrays(**arrays, label_smoothing=made.label_smoothing), [arrays["logits"]])
        self.upstreams = [arrays["upstream"]] if "upstream" in arrays else []

    def _set(self, case: Case, arrays: problem.Arrays, logits: list[Tensor]) -> None:
        """The arrays of the first input, and the logits of all, as they lie in memory."""
        self.case, self.logits = case, logits
        self.buffers = [one.clone() for one in logits]
        self.target = self._view(arrays.target) if case.probabilities else arrays.target
        self.one = torch.zeros((), device=arrays.target.device, requires_grad=True)
        self.answers = problem.Answers(torch, case, arrays)
        self.options: dict[str, Any] = {"label_smoothing": arrays.label_smoothing} if case.options else {}
        if arrays.weight is not None:
            self.options["weight"] = arrays.weight

    def _view(self, tensor: Tensor) -> Tensor:
        """The input's shape, of a tensor as it lies in memory; and back."""
        return tensor.transpose(1, 2) if self.case.transposed else tensor

    @cached_property
    def leaves(self) -> list[Tensor]:
        """The logits as inputs of the loss."""
        inputs = self.buffers if self.restores else self.logits
        return [self._view(one).detach().requires_grad_() for one in inputs]

    def _restore(self) -> None:
        for buffer, logits in zip(self.buffers, self.logits, strict=True):
            buffer.copy_(logits)

    # ---- the variants

    @cached_property
    def compiled(self) -> Loss:
        """Made where it is first called for: the import of the compiler takes a second."""
        return torch.compile(F.cross_entropy, dynamic=False)

    def variants(self, what: str) -> dict[str, Prepare]:
        """All that there are of it, the limits included."""
        if what == cases.FORWARD:
            return {
                cases.EAGER: self._value(F.cross_entropy),
                cases.COMPILE: lambda calls: self._value(self.compiled)(calls),
                cases.DEFAULT: self._value(softmax_ext.cross_entropy),
                **{name: self._value(loss_fn) for name, loss_fn in self._peers().items()},
                cases.SUM: self._repeat(lambda logits, buffer: logits.sum()),
            }
        if what in (cases.SOFTMAX, cases.LOG_SOFTMAX):
            functions = {cases.EAGER: getattr(F, what), cases.DEFAULT: getattr(softmax_ext, what)}
            return {name: self._softmax_step(function) for name, function in functions.items()}
        wrap = scaled if what == cases.SCALED else lambda loss_fn: loss_fn
        made = {
            cases.EAGER: self._step(wrap(F.cross_entropy)),
            cases.COMPILE: lambda calls: self._step(wrap(self.compiled))(calls),
            cases.DEFAULT: self._step(wrap(softmax_ext.cross_entropy)),
            cases.PRECOMPUTE: self._step(wrap(ours(precompute_grad=True))),
            cases.INPLACE: self._overwriting_step(wrap(ours(precompute_grad=True, inplace=True))),
        }
        for name, loss_fn in self._peers().items():
            step = self._overwriting_step if name == cases.LIGER else self._step
            made[name] = step(wrap(loss_fn))
        return made if what == cases.MEMORY else {**made, self.limit: self._repeat(self._limit)}

    def _peers(self) -> dict[str, Loss]:
        return {}

    def _step(self, loss_fn: Loss) -> Prepare:
        def call_of(leaf: Tensor) -> tuple[Tensor, Tensor | None]:
            loss = loss_fn(leaf, self.target, **self.options)
            loss.backward()
            return loss.detach(), _take_gradient(leaf)

        return self._in_turn(call_of)

    def _value(self, loss_fn: Loss) -> Prepare:
        def call_of(leaf: Tensor) -> tuple[Tensor, None]:
            with torch.no_grad():
                return loss_fn(leaf, self.target, **self.options), None

        return self._in_turn(call_of)

    def _softmax_step(self, function: Loss) -> Prepare:
        upstreams = {id(leaf): self._view(g) for leaf, g in zip(self.leaves, self.upstreams, strict=True)}

        def call_of(leaf: Tensor) -> tuple[Tensor, Tensor | None]:
            output = function(leaf, 1)
            output.backward(upstreams[id(leaf)])
            return output.detach(), _take_gradient(leaf)

        return self._in_turn(call_of)

    def _in_turn(self, call_of: Callable[[Tensor], Any]) -> Prepare:
        """Calls with one leaf after the other."""

        def prepare(calls: int) -> Callable[[], Any]:
            if self.restores:
                self._restore()
            leaves = cycle(self.leaves)
            return lambda: call_of(next(leaves))

        return prepare

    def _overwriting_step(self, loss_fn: Loss) -> Prepare:
        def prepare(calls: int) -> Callable[[], tuple[Tensor, Tensor]]:
            self._restore()
            buffers = list(islice(cycle(self.buffers), calls))
            handed = iter([(self._view(_Handed.apply(self.one, buffer)), buffer) for buffer in buffers])

            def call() -> tuple[Tensor, Tensor]:
                logits, buffer = next(handed)
                loss = loss_fn(logits, self.target, **self.options)
                loss.backward()
                return loss.detach(), self._view(buffer)

            return call

        return prepare

    # ---- the limits

    def _repeat(self, action: Callable[[Tensor, Tensor], Any]) -> Prepare:
        def prepare(calls: int) -> Callable[[], Any]:
            pairs = cycle(zip(self.logits, self.buffers, strict=True))
            return lambda: action(*next(pairs))

        return prepare

    @staticmethod
    def _limit(logits: Tensor, buffer: Tensor) -> None:
        buffer.mul_(1.0001)

    # ---- the check

    def complaint(self, what: str, result: tuple[Tensor, Tensor | None]) -> str:
        """The loss, or the softmax, and the gradient if there is one."""
        value, gradient = result
        value = self._view(value) if value.dim() else value.reshape(1, 1)
        with value.device, torch.no_grad():
            return self.answers.complaint(what, value, None if gradient is None else self._view(gradient))


class CudaWorkload(TorchWorkload):
    """A case as tensors on a GPU, in so many copies as are used in turn."""

    restores = True
    limit = cases.COPY

    def __init__(self, case: Case, copies: int, device: str = "cuda"):
        generator = torch.Generator(device).manual_seed(0)
        on_gpu = {"generator": generator, "device": device}
        dtype = getattr(torch, case.dtype)
        logits = [torch.randn(case.shape, dtype=dtype, **on_gpu) for _ in range(copies)]
        target = torch.randint(case.classes, case.shape[:1] + case.shape[2:], **on_gpu)
        self.upstreams = logits[1:] + logits[:1]
        with torch.device(device):
            self._set(case, problem.Arrays(logits[0], target, upstream=self.upstreams[0]), logits)

    def _peers(self) -> dict[str, Loss]:
        """They take [rows, classes] alone."""
        return {cases.LIGER: liger, cases.QUACK: quack} if len(self.case.shape) == 2 else {}

    @staticmethod
    def _limit(logits: Tensor, buffer: Tensor) -> None:
        buffer.copy_(logits)


def build(request: worker.Request) -> TorchWorkload:
    """The case on the device that is asked for."""
    if request.device == cases.CUDA:
        return CudaWorkload(request.case, request.copies)
    return TorchWorkload(request.case, request.whats)


if __name__ == "__main__":
    worker.main(build, torch.set_num_threads)
