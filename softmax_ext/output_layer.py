"""A language model's output layer, given as a module, as the operands of a linear cross entropy.

A module may be more than its weight: it has a bias, hooks, adapters of peft. Each counts here, or is refused by name. A
loss that took ``lm_head.weight`` alone would drop them in silence.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .replaced_class import original_class


class Projection(NamedTuple):
    """The logits are ``F.linear(*projection)``: input (..., in_features), weight (C, in_features), bias (C) or None."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None


def _refuse(op: str, module: nn.Module, why: str) -> NoReturn:
    need = "be an nn.Linear, or peft's LoRA layer or modules_to_save around one"
    way_out = "Compute the logits with the module and use cross_entropy."
    own = original_class(module)
    name = own.__name__ if own.__module__.startswith("torch.nn.") else f"{own.__module__}.{own.__qualname__}"
    checks.refuse(TypeError, op, "lm_head", need, f"{name}{why}", way_out)


def _peft(path: str, name: str) -> Any:
    """A class of peft, or None if peft is not imported: then no module can be of that class."""
    module = sys.modules.get(f"peft.{path}")
    return None if module is None else getattr(module, name, None)


def _is(module: nn.Module, kind: Any) -> bool:
    return kind is not None and isinstance(module, kind)


def _check_plain(op: str, module: nn.Module) -> None:
    """TypeError where a call of the module does more than the ``forward`` of its class."""
    if module._forward_hooks or module._forward_pre_hooks:
        _refuse(op, module, " with forward hooks, which a fused loss cannot run")
    check_deferred(op, module)


def check_deferred(op: str, module: nn.Module) -> None:
    """The same, but for the forward hooks of a module that is called and whose output is deferred."""
    if module._backward_hooks or module._backward_pre_hooks:
        _refuse(op, module, " with backward hooks, which a fused loss cannot run")
    if "forward" in vars(module):
        _refuse(op, module, " with a forward of its own instance, as accelerate's hooks make one")
    if original_class(module).__call__ is not nn.Module.__call__:
        _refuse(op, module, " with a __call__ of its own")


def projection(op: str, module: nn.Module, hidden: Tensor) -> Projection:
    """What a call of ``module(hidden)`` computes, as one product.

    Raises:
        TypeError: the module does something else.
    """
    if not isinstance(module, nn.Module):
        checks.refuse(TypeError, op, "lm_head", "be the output layer, an nn.Module", checks.describe(module))
    _check_plain(op, module)
    return of_forward(op, module, hidden)


def of_forward(op: str, module: nn.Module, hidden: Tensor) -> Projection:
    """The same for ``module.forward(hidden)``, which runs no hooks of the module itself."""
    if _is(module, _peft("utils.other", "ModulesToSaveWrapper")):
        return projection(op, _active(module), hidden)
    if _is(module, _peft("tuners.lora.layer", "LoraLayer")):
        return _with_lora(op, module, hidden)
    own: Any = original_class(module)
    if not isinstance(module, nn.Linear) or own.forward is not nn.Linear.forward:
        _refuse(op, module, "")
    return Projection(hidden, module.weight, module.bias)


def check(op: str, module: nn.Module) -> None:
    """TypeError unless ``of_forward`` takes the module, for any input."""
    features = getattr(module, "in_features", None)
    if not isinstance(features, int):
        _refuse(op, module, "")
    check_deferred(op, module)
    with torch.no_grad():
        of_forward(op, module, next(module.parameters()).new_empty(0, features))


def _active(wrapper: Any) -> nn.Module:
    """The module that peft's wrapper of modules_to_save calls."""
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module  # type: ignore[no-any-return]
    return wrapper.modules_to_save[wrapper.active_adapters[0]]  # type: ignore[no-any-return]


def _with_lora(op: str, layer: Any, hidden: Tensor) -> Projection:
    """x W^T + s dropout(x) A^T B^T as one product: cat([x, s dropout(x) A^T]) cat([W, B])^T, in the input's dtype."""
    if original_class(layer) is not _peft("tuners.lora.layer", "Linear"):
        _refuse(op, layer, "")
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward does
    plain = projection(op, layer.base_layer, hidden)
    if layer.disable_adapters or layer.merged:
        return plain
    inputs, weights, bias = [plain.input], [plain.weight], plain.bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            _refuse(op, layer, f" with the variant {type(layer.lora_variant[name]).__name__}")
        down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        for part in (down, up):
            _check_plain(op, part)
        low_rank = F.linear(layer.lora_dropout[name](hidden.to(down.weight.dtype)), down.weight, down.bias)
        inputs.append((low_rank * scaling).to(hidden.dtype))
        weights.append(up.weight.to(plain.weight.dtype))
        if up.bias is not None:
            of_adapter = (up.bias * scaling).to(plain.weight.dtype)
            bias = of_adapter if bias is None else bias + of_adapter
    return Projection(torch.cat(inputs, -1), torch.cat(weights, 1), bias)
