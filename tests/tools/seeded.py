"""Random tensors that are the same on every device: drawn on the CPU, by a generator of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """On the default device, as what torch makes itself is; the same numbers in every dtype, but for their rounding."""
    values = torch.randn(shape, generator=_generator(seed), dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device(), dtype)


def randint(high: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Classes below ``high``, on the default device."""
    return torch.randint(high, shape, generator=_generator(seed), device="cpu").to(torch.get_default_device())
