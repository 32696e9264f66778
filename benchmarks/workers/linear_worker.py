"""Measures linear cross entropy, on the CPU or a GPU.

A step is forward, backward, and dropping the gradients. Before a variant is timed its loss, and its gradients of some
rows and of some classes, are held against float64.
"""

from collections.abc import Callable
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from cases import CHUNKED, COMPILE, CUDA, CUT, DEFAULT, EAGER, LIGER, MEMORY_OF_PLAN, WIDE, Case
from torch import Tensor
from workers import problem, worker
from workers.measure import Prepare

import softmax_ext

_CHECKED = 8  # rows, and classes
# Torch rounds the logits, their log-probabilities and the sum of these to bfloat16.
_TOLERANCE = {**problem.TOLERANCE, ("bfloat16", "value"): 2**-5}
_CHUNK = 256
_WEIGHT_SCALE = 0.02  # GPT-2's

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Result = tuple[Tensor, Tensor, Tensor]  # the loss, the checked rows and the checked classes of the gradients


def _whole(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def _chunked(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions())


def _liger(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, w, y)


def _cut(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, w, y)


class LinearWorkload:
    """A case as tensors, drawn on their device, and the right answers."""

    keeps_memory = False

    def __init__(self, case: Case, device: str):
        on_device = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        dtype = getattr(torch, case.dtype)
        self.case = case
        self.uncounted_bytes = case.gradient_bytes
        self.input = torch.randn(case.rows, case.features, **on_device).to(dtype).requires_grad_()
        weight = torch.randn(case.classes, case.features, **on_device)
        self.weight = weight.mul_(_WEIGHT_SCALE).to(dtype).requires_grad_()
        self.target = torch.randint(0, case.classes, (case.rows,), **on_device)
        self.rows = torch.linspace(0, case.rows - 1, _CHECKED, device=device).long()
        self.classes = self.target[self.rows]  # whose gradients are not next to nothing

    def variants(self, what: str) -> dict[str, Prepare]:
        """All that this torch has."""
        losses: dict[str, Loss] = {
            EAGER: _whole,
            COMPILE: torch.compile(_whole, dynamic=False),
            CHUNKED: _chunked,
            LIGER: _liger,
            CUT: _cut,
            DEFAULT: softmax_ext.linear_cross_entropy,
        }
        for plan, share in MEMORY_OF_PLAN.items():
            memory = int(share * self.case.logits_bytes)
            losses[plan] = partial(softmax_ext.linear_cross_entropy, memory=memory)
        if self.input.dtype.itemsize == 2:
            losses[WIDE] = partial(softmax_ext.linear_cross_entropy, logits_dtype=torch.float32)
        if not hasattr(F, "linear_cross_entropy"):
            del losses[CHUNKED]
        return {name: self._step(loss) for name, loss in losses.items()}

    def _step(self, loss_fn: Loss) -> Prepare:
        def call() -> Result:
            loss = loss_fn(self.input, self.weight, self.target)
            loss.backward()
            result = loss.detach(), self.input.grad[self.rows], self.weight.grad[self.classes]
            self.input.grad = self.weight.grad = None
            return result

        return lambda calls: call

    @cached_property
    def expected(self) -> Result:
        """In float64, chunk by chunk."""
        x, w = self.input.detach().double(), self.weight.detach().double()
        losses, of_classes = [], x.new_zeros(_CHECKED, self.case.features)
        for begin in range(0, self.case.rows, _CHUNK):
            rows = slice(begin, begin + _CHUNK)
            log_p = (x[rows] @ w.t()).log_softmax(1)
            losses.append(-log_p.gather(1, self.target[rows, None]).sum())
            dz = log_p[:, self.classes].exp() - (self.target[rows, None] == self.classes).double()
            of_classes += dz.t() @ x[rows]
        p = (x[self.rows] @ w.t()).softmax(1)
        p[torch.arange(_CHECKED, device=x.device), self.target[self.rows]] -= 1
        return sum(losses) / self.case.rows, (p @ w) / self.case.rows, of_classes / self.case.rows

    def complaint(self, what: str, result: Result) -> str:
        """What is wrong with a result; "" if nothing."""
        names = (("loss", "value"), ("gradient of the input", "gradient"), ("gradient of the weight", "gradient"))
        for (name, kind), got, right in zip(names, result, self.expected, strict=True):
            error = ((got.double() - right).abs().max() / right.abs().max()).item()
            tolerance = _TOLERANCE[self.case.dtype, kind]
            if not error <= tolerance:
                return f"{name}: relative error {error:.1e}, allowed {tolerance:.1e}"
        return ""


def build(request: worker.Request) -> LinearWorkload:
    """The case on the device that is asked for."""
    return LinearWorkload(request.case, "cuda" if request.device == CUDA else "cpu")


if __name__ == "__main__":
    worker.main(build, torch.set_num_threads)
