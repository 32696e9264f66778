"""The loss of a causal language model from its last hidden states and its output layer: shift, mean, adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, internals, output_layer
from .functional import CrossEntropyStats
from .linear import linear_cross_entropy
from .reference import is_live

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "causal_lm_loss"


class CausalLMStats(NamedTuple):
    """Metrics of a causal language model, computed in the same pass as its loss. None has a derivative.

    Attributes:
        token_accuracy: the share of the counted positions whose label is the largest logit's class; [] float32. NaN
            without a counted position, as is the next.
        mean_entropy: the mean of their predicted distributions' entropies, in nats; [] float32.
        token_count: how many positions count, those whose label is not ignored; [] int64.
        positions: the statistics of each position, in the labels' shape. With ``shift`` those at position t are of the
            prediction of token t + 1. Where the label is ignored, lse, nll and entropy are 0, and the prediction is -1.
    """

    token_accuracy: Tensor
    mean_entropy: Tensor
    token_count: Tensor
    positions: CrossEntropyStats


internals.register_namedtuple(CausalLMStats, serialized_type_name="softmax_ext.CausalLMStats")


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """The label of each position's next token; that of the last position is ignored."""
    if labels.dtype == torch.uint8:  # which cannot hold a negative ignore_index
        labels = labels.long()
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def on_device(count: int | Tensor | None, device: torch.device) -> int | Tensor | None:
    """A number, or a tensor moved to ``device``."""
    return count.to(device) if isinstance(count, Tensor) else count


def _metrics(positions: CrossEntropyStats, labels: Tensor, ignore_index: int) -> CausalLMStats:
    live = is_live(labels, ignore_index)
    count, right = live.sum(), (live & (positions.prediction == labels)).sum()
    return CausalLMStats((right / count).float(), (positions.entropy.sum() / count).float(), count, positions)


class _Keywords(TypedDict, total=False):
    shift: bool
    num_items_in_batch: int | Tensor | None
    ignore_index: int
    softcap: float | None
    logit_scale: float
    z_loss: float
    memory: int | None
    dtype: torch.dtype | None
    logits_dtype: torch.dtype | None


@overload
def causal_lm_loss(
    hidden: Tensor,
    lm_head: nn.Module,
    labels: Tensor,
    *,
    return_stats: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...


@overload
def causal_lm_loss(
    hidden: Tensor,
    lm_head: nn.Module,
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, CausalLMStats]: ...


def causal_lm_loss(
    hidden: Tensor,
    lm_head: nn.Module,
    labels: Tensor,
    *,
    shift: bool = True,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    return_stats: bool = False,
    memory: int | None = None,
    dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, CausalLMStats]:
    r"""Cross entropy of a language model's next tokens, from its last hidden states, without making all logits.

    It equals the loss that transformers computes from ``lm_head(hidden)``. It takes the memory and the products of
    :func:`softmax_ext.linear_cross_entropy`.

    Args:
        hidden: the last hidden states, ``(..., positions, in_features)``; float64, float32, bfloat16 or float16.
        lm_head: the output layer, the *module*: an ``nn.Linear``, or around one peft's LoRA layer or its wrapper of
            ``modules_to_save``. So its bias and its adapters count, and get their gradients. LoRA's product is one with
            the weight's, in the hidden states' dtype, and its dropout is applied. This takes a copy of the weight and a
            gradient of the copy, though the weight may be frozen.
        labels: the tokens, ``(..., positions)``, int64 or uint8. They are moved to the hidden states' device.
        shift: position t predicts the token t + 1, and the last position predicts nothing. False: ``labels`` has each
            position's next token already.
        num_items_in_batch: what the sum of the losses is divided by: the number of tokens of all micro-batches (and
            ranks). A number, or a tensor of one element on any device. None: the mean over the positions whose label is
            not ignored.
        ignore_index: the label of positions that do not count.
        softcap: caps the logits smoothly to (-softcap, softcap) (Gemma 2); None or 0: no cap.
        logit_scale: factor of the logits, before the cap (Cohere; Granite has its inverse).
        z_loss: factor of the squared log-sum-exp.
        return_stats: also return :class:`CausalLMStats`. Takes no further product.
        memory: the most bytes that forward and backward may take beyond the gradients, as in ``linear_cross_entropy``.
        dtype: the dtype of the loss and of the arithmetic on each logit. Default: the hidden states'; float32 for half
            types under autocast. A mean in bfloat16 has three digits: use ``torch.float32`` to log it.
        logits_dtype: torch.float32: logits of half types are not rounded.

    Returns:
        The loss, a scalar. With ``return_stats`` the tuple (loss, stats).

    Raises:
        TypeError: ``lm_head`` is no such module: another layer or wrapper, hooks, a variant of LoRA. The text names it.
        RuntimeError, ValueError, IndexError: as :func:`softmax_ext.linear_cross_entropy`; RuntimeError for labels of
            another shape.
    """
    checks.check_dense(_OP, "hidden", hidden)
    checks.check_dense(_OP, "labels", labels)
    if hidden.dim() < 2:
        checks.refuse(RuntimeError, _OP, "hidden", "have shape (..., positions, in_features)", checks.describe(hidden))
    if not internals.equal_sizes(labels.shape, hidden.shape[:-1]):
        need = f"have shape {list(hidden.shape[:-1])}, that of hidden without in_features"
        checks.refuse(RuntimeError, _OP, "labels", need, checks.describe(labels))
    if shift:
        labels = shifted(labels, ignore_index)
    labels = labels.to(hidden.device)
    options: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale, "z_loss": z_loss, "memory": memory}
    options |= {"dtype": dtype, "logits_dtype": logits_dtype}
    projection = output_layer.projection(_OP, lm_head, hidden)
    return loss_of(projection, labels, num_items_in_batch, ignore_index, return_stats, **options)  # type: ignore[no-any-return]


def loss_of(
    projection: output_layer.Projection,
    labels: Tensor,
    num_items_in_batch: int | Tensor | None,
    ignore_index: int,
    return_stats: bool,
    **options: Any,
) -> Any:
    """The loss of labels that need no shift, and its metrics; ``options`` are linear_cross_entropy's."""
    hidden, weight, bias = projection
    options |= {"linear_bias": bias, "ignore_index": ignore_index}
    options["denominator"] = on_device(num_items_in_batch, hidden.device)
    if not return_stats:
        return linear_cross_entropy(hidden, weight, labels, **options)
    loss, positions = linear_cross_entropy(hidden, weight, labels, return_stats="detached", **options)
    return loss, _metrics(positions, labels, ignore_index)
