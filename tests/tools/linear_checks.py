"""A linear cross entropy by each plan: its operands, what selects the plan, and its loss with its gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from softmax_ext import plans

LARGE = 1 << 40
NAMES = ["whole", "rows", "classes"]


def operands(rows: int, features: int, classes: int, dtype: torch.dtype, scale: float = 0.3) -> tuple[Tensor, ...]:
    x = torch.randn(rows, features).to(dtype).requires_grad_()
    w = (scale * torch.randn(classes, features)).to(dtype).requires_grad_()
    return x, w, torch.randint(0, classes, (rows,))


def limits_for(name: str, size: tuple[int, int, int], dtype: torch.dtype, positions: int = 1) -> dict[str, int]:
    """What selects a plan, with several chunks but for "whole". For "classes" there must be many more than rows."""
    rows, features, classes = size
    if name == "whole":
        return {"memory": LARGE}
    if name == "rows":
        return {"chunk_rows": max(rows // 4, 1)}
    problem = plans.Problem(rows, features, classes * positions, dtype, "cpu", positions=positions)
    memory = plans._bytes(problem, "classes", classes // 12 * positions)
    assert plans.choose(problem, plans.Limits(memory=memory)).name == "classes"
    return {"memory": memory}


def both(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    loss = function(*leaves)
    torch.manual_seed(1)
    up = torch.rand(loss.shape).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, up)]
