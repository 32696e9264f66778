"""Hugging Face's transformers: one call gives a model this package's loss.

    softmax_ext.integrations.transformers.apply(model)                # the loss of the logits
    softmax_ext.integrations.transformers.apply(model, linear=True)   # output layer and loss in one, without logits
    softmax_ext.integrations.transformers.undo(model)

A value flows so: the model's own forward calls its output layer, which with ``linear=True`` returns DeferredLogits; the
forward scales or caps them and calls ``model.loss_function``, transformers' public hook, which is one of the functions
below. Nothing but this instance changes.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss import loss_utils

from .. import causal_lm, checks, functional, output_layer, plans
from ..replaced_class import Replaced, original_class, replace, restore
from .deferred import DeferredLogits

_OP = "integrations.transformers.apply"

# ---- the losses ----


class LossOptions(NamedTuple):
    """The options of :func:`apply` that the losses take."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    precompute_grad: bool = False
    memory: int | None = None
    logits_dtype: torch.dtype | None = None


def _loss_of_logits(
    rows: Tensor,
    target: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    *,
    options: LossOptions,
    **kwargs: Any,
) -> Tensor:
    """transformers' fixed_cross_entropy: logits [N, C] and class indices [N]; computes in float32, without a copy."""
    return functional.cross_entropy(
        rows,
        target,
        ignore_index=ignore_index,
        denominator=causal_lm.on_device(num_items_in_batch, rows.device),
        label_smoothing=options.label_smoothing,
        dtype=torch.float32 if rows.dtype.itemsize == 2 else None,
        z_loss=options.z_loss,
        precompute_grad=options.precompute_grad,
    )


def _loss_of_deferred(
    logits: DeferredLogits,
    labels: Tensor,
    num_items_in_batch: int | Tensor | None,
    ignore_index: int,
    options: LossOptions,
) -> Tensor:
    hidden, (scale, softcap) = logits.hidden, logits.transform
    output_layer.check_deferred(_OP, logits.layer)  # hooks may have come since
    if labels.numel() != hidden.shape[:-1].numel():
        need = f"be as many as the {hidden.shape[:-1].numel()} positions of the logits"
        checks.refuse(ValueError, _OP, "labels", need, checks.describe(labels))
    projection = output_layer.of_forward(_OP, logits.layer, hidden)
    loss: Tensor = causal_lm.loss_of(
        projection,
        labels.reshape(hidden.shape[:-1]),
        num_items_in_batch,
        ignore_index,
        False,
        label_smoothing=options.label_smoothing,
        dtype=torch.float32 if hidden.dtype.itemsize == 2 else None,
        z_loss=options.z_loss,
        softcap=softcap,
        logit_scale=scale,
        memory=options.memory,
        logits_dtype=options.logits_dtype,
    )
    logits.losses.append(loss)
    return loss


def _loss_of_tokens(
    logits: Tensor | DeferredLogits,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None,
    ignore_index: int,
    options: LossOptions,
) -> Tensor:
    labels = labels.to(logits.device)
    if isinstance(logits, DeferredLogits) and logits.made is not None:
        logits = logits.made
    if isinstance(logits, DeferredLogits):
        return _loss_of_deferred(logits, labels, num_items_in_batch, ignore_index, options)
    logits = logits.view(-1, vocab_size)
    return _loss_of_logits(logits, labels.reshape(-1), num_items_in_batch, ignore_index, options=options)


def loss_of_causal_lm(
    logits: Tensor | DeferredLogits,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    options: LossOptions,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss."""
    if shift_labels is None:
        shift_labels = causal_lm.shifted(labels, ignore_index)
    return _loss_of_tokens(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index, options)


def loss_of_masked_lm(
    logits: Tensor | DeferredLogits,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    *,
    options: LossOptions,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForMaskedLMLoss."""
    return _loss_of_tokens(logits, labels, vocab_size, num_items_in_batch, ignore_index, options)


def loss_of_token_classification(
    logits: Tensor, labels: Tensor, config: Any, *, options: LossOptions, **kwargs: Any
) -> Tensor:
    """transformers' ForTokenClassification."""
    logits = logits.view(-1, config.num_labels)
    return _loss_of_logits(logits, labels.view(-1).to(logits.device), options=options, **kwargs)


def loss_of_sequence_classification(
    labels: Tensor, pooled_logits: Tensor, config: Any, *, options: LossOptions, **kwargs: Any
) -> Tensor:
    """transformers' ForSequenceClassificationLoss, whose regression and multi-label losses are its own."""
    if config.problem_type is None and config.num_labels > 1 and labels.dtype in (torch.long, torch.int):
        config.problem_type = "single_label_classification"
    if config.problem_type != "single_label_classification":
        loss: Tensor = loss_utils.ForSequenceClassificationLoss(labels, pooled_logits, config, **kwargs)
        return loss
    logits, labels = pooled_logits.view(-1, config.num_labels), labels.to(pooled_logits.device).view(-1)
    return _loss_of_logits(logits, labels, options=options, **kwargs)


_OURS: dict[Any, Callable[..., Tensor]] = {
    loss_utils.ForCausalLMLoss: loss_of_causal_lm,
    loss_utils.ForMaskedLMLoss: loss_of_masked_lm,
    loss_utils.ForTokenClassification: loss_of_token_classification,
    loss_utils.ForSequenceClassificationLoss: loss_of_sequence_classification,
}

# ---- output layer and loss in one ----


def _this_thread() -> int:
    """In compiled code 0: it cannot ask."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class _DeferringLayer(Replaced):
    """An output layer that returns DeferredLogits while its model's forward, in the same thread, wants them."""

    _deferring_thread: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own output, or DeferredLogits."""
        own = self._original.forward  # type: ignore[attr-defined]
        if self._deferring_thread == _this_thread() and len(args) == 1 and not kwargs:
            layer: Any = self
            return DeferredLogits(args[0], layer, partial(own, self))
        return own(self, *args, **kwargs)


def _position_of_labels(model: type) -> int:
    """Which positional argument of the model's forward is ``labels``; -1 if it is given by name alone."""
    parameters = list(inspect.signature(model.forward).parameters.values())  # type: ignore[attr-defined]
    for position, parameter in enumerate(parameters[1:]):
        if parameter.name == "labels" and parameter.kind != parameter.KEYWORD_ONLY:
            return position
    return -1


def _without_deferred(output: Any) -> Any:
    """The model's output with None for logits of which there is the loss; others are computed."""

    def known(value: Any) -> Any:
        if not isinstance(value, DeferredLogits):
            return value
        return value.made if value.made is not None or value.losses else value.materialize("the output without a loss")

    if isinstance(output, tuple):
        return tuple(known(value) for value in output)
    if type(output) is dict:
        return {name: known(value) for name, value in output.items()}
    if not hasattr(output, "__dataclass_fields__"):
        return known(output)
    return type(output)(**{name: known(getattr(output, name)) for name in type(output).__dataclass_fields__})


def _call(own: Callable[..., Any], fuses: bool, model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own forward; if it ``fuses``, with DeferredLogits in place of logits, and None for them at the end.

    A forward may call the model again, as distillation does: the inner call restores what the outer one has set.
    """
    layer = _deferring_layer(model) if fuses else model.get_output_embeddings()
    if not isinstance(layer, _DeferringLayer):
        return own(model, *args, **kwargs)
    before = layer._deferring_thread
    layer._deferring_thread = _this_thread() if fuses else None
    try:
        output = own(model, *args, **kwargs)
    finally:
        layer._deferring_thread = before
    return _without_deferred(output) if fuses else output


class _FusedModel(Replaced):
    """A model with that forward, unless ``output_logits=True``. Its signature is the model's own, as Trainer reads it.

    Somebody may keep the bound forward until after ``undo``.
    """

    def __init_subclass__(cls) -> None:
        """``cls`` is a subclass of the model's class too."""
        own: Any = cls._original.forward  # type: ignore[attr-defined]
        position = _position_of_labels(cls._original)

        @wraps(own)
        def forward(self: Any, *args: Any, output_logits: bool = False, **kwargs: Any) -> Any:
            labels = args[position] if 0 <= position < len(args) else kwargs.get("labels")
            fuses = labels is not None and self.training and not output_logits
            if not isinstance(self, _FusedModel):
                return own(self, *args, **kwargs)
            return _call(own, fuses, self, *args, **kwargs)

        setattr(cls, "forward", forward)  # noqa: B010  the model's class has it for type checkers


def _deferring_layer(model: Any) -> Any:
    """The model's output layer, made a _DeferringLayer if peft or a resize put another one in its place."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, _DeferringLayer):
        output_layer.check(_OP, layer)
        for inner in layer.modules():  # the former one, within peft's
            restore(inner)
        replace(layer, _DeferringLayer)
    return layer


# ---- apply, undo ----


def _model_within(model: Any) -> Any:
    """The PreTrainedModel within wrappers of peft, torch.compile and DistributedDataParallel."""
    found = model
    while not isinstance(found, PreTrainedModel):
        if hasattr(found, "get_base_model"):  # peft's PeftModel
            found = found.get_base_model()
        elif isinstance(getattr(found, "_orig_mod", None), nn.Module):  # torch.compile's
            found = found._orig_mod
        elif isinstance(getattr(found, "module", None), nn.Module):
            found = found.module
        else:
            checks.refuse(TypeError, _OP, "model", "be a transformers.PreTrainedModel", checks.describe(model))
    return found


def _uses_loss_function(model: PreTrainedModel) -> bool:
    return "loss_function" in inspect.unwrap(original_class(model).forward).__code__.co_names  # type: ignore[attr-defined]


def _loss_for(model: PreTrainedModel) -> Callable[..., Tensor]:
    name = original_class(model).__name__
    if not _uses_loss_function(model):
        way_out = "Its forward computes the loss itself: use softmax_ext.patch()."
        checks.refuse(ValueError, _OP, "model", "compute its loss with self.loss_function", name, way_out)
    given = vars(model).get("_loss_function")
    if given is not None and getattr(given, "func", None) not in _OURS.values():
        way_out = "apply would replace it by another loss."
        checks.refuse(
            ValueError, _OP, "model", "have no loss_function of the user's", f"{name} with {given!r}", way_out
        )
    theirs = loss_utils.LOSS_MAPPING.get(getattr(model, "loss_type", None), loss_utils.ForCausalLMLoss)
    if theirs not in _OURS:
        known = ", ".join(one.__name__ for one in _OURS)
        need = f"be one whose loss is {known}"
        checks.refuse(ValueError, _OP, "model", need, f"{name} with {theirs.__name__}", "Use softmax_ext.patch().")
    return _OURS[theirs]


def apply(
    model: nn.Module,
    linear: bool = False,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    precompute_grad: bool = False,
    memory: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Gives a model of transformers this package's loss.

    With ``linear=True`` output layer and loss are one, as in :func:`softmax_ext.linear_cross_entropy`: in training,
    where labels are given, the logits are never all made. ``outputs.logits`` is None then. They are made in eval mode
    and where ``model(..., output_logits=True)`` asks for them. A cap or a scale of the logits is taken from what the
    model's own forward does (Gemma 2, Cohere, Granite). A forward that does anything else with them gets them, and a
    warning says so.

    The loss is transformers' own in all else: shifted labels or ``shift_labels``, ``num_items_in_batch`` (a number or
    one element; the loss is a scalar). It is float32 for half types, float64 for float64. Call this before or after
    peft; before torch.compile, DistributedDataParallel and whatever replaces ``model.forward``.

    Args:
        model: an instance of a model with a loss for causal or masked language models, for classification of sequences
            or of tokens; or one within peft's PeftModel. It is changed.
        linear: output layer and loss in one, for language models.
        label_smoothing: in [0, 1].
        z_loss: factor of the squared log-sum-exp.
        precompute_grad: of :func:`softmax_ext.cross_entropy`, where logits are made.
        memory: of :func:`softmax_ext.linear_cross_entropy`, where they are not, so with ``linear`` alone.
        logits_dtype: likewise.

    Returns:
        The model.

    Raises:
        TypeError: it is no such model; its output layer is none that a fused loss can take.
        ValueError: its forward computes the loss itself, or another kind of loss; ``linear`` with a classifier;
            ``model.forward`` or ``model.loss_function`` was replaced already; an option out of range.
        RuntimeError: ``label_smoothing`` out of range.
    """
    checks.check_options(_OP, 1, "mean", -100, label_smoothing, z_loss, None, 1.0)
    if not linear and (memory is not None or logits_dtype is not None):
        checks.refuse(ValueError, _OP, "memory and logits_dtype", "be None without linear=True", "one of them")
    inner = _model_within(model)
    plans.check_limits(_OP, inner.dtype, None, memory, logits_dtype)
    loss = _loss_for(inner)
    if linear:
        _check_linear(inner, loss)
        _deferring_layer(inner)
        replace(inner, _FusedModel)
    else:
        _undo_linear(inner)
    options = LossOptions(label_smoothing, z_loss, precompute_grad, memory, logits_dtype)
    inner.loss_function = partial(loss, options=options)
    return model


def _check_linear(model: PreTrainedModel, loss: Callable[..., Tensor]) -> None:
    name = original_class(model).__name__
    if loss not in (loss_of_causal_lm, loss_of_masked_lm):
        checks.refuse(ValueError, _OP, "linear", "be False with a classifier", name)
    if "forward" in vars(model) and not isinstance(model, _FusedModel):
        need = "have the forward of its class"
        way_out = "Call apply before what replaces model.forward (accelerate's prepare, a trainer)."
        checks.refuse(ValueError, _OP, "model", need, f"{name} with a forward of its own", way_out)
    if model.get_output_embeddings() is None:
        checks.refuse(TypeError, _OP, "model", "have an output layer (get_output_embeddings)", name)


def _undo_linear(model: PreTrainedModel) -> None:
    layer = model.get_output_embeddings()
    for module in layer.modules() if isinstance(layer, nn.Module) else ():
        vars(module).pop("_deferring_thread", None)
        restore(module)
    restore(model)


def undo(model: nn.Module) -> nn.Module:
    """Gives the model its own loss, forward and output layer back; returns it."""
    inner = _model_within(model)
    _undo_linear(inner)
    vars(inner).pop("_loss_function", None)
    return model
