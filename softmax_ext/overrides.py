"""What the public functions need of torch to hand a call over to __torch_function__, and to notice torch.jit.trace.

A function hands a call over, as those of torch.nn.functional do, where a tensor's class or a mode has a
__torch_function__. Under torch.compile it does not: Dynamo calls __torch_function__ itself, for each operation inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

__all__ = ["hand_over", "has_torch_function_unary", "has_torch_function_variadic", "is_jit_tracing"]

# torch declares it with the parameters of the function, which has other types in its overloads.
hand_over: Callable[..., Any] = handle_torch_function

is_jit_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
