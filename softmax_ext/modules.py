"""The nn.Modules: drop-ins for torch's, with the options of the functions and the state_dict of torch's modules."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from . import checks, functional, linear
from .functional import CrossEntropyStats
from .scripting import not_scriptable

# So that a warning of a function shows the line that calls the module: behind the functions of nn.Module.
_STACKLEVEL = 6


@not_scriptable("torch.nn.Softmax")
class Softmax(nn.Softmax):
    """Softmax over one dimension; the counterpart of :class:`torch.nn.Softmax`.

    Args:
        dim: the dimension that sums to 1; None, which is deprecated, chooses one as the function does.

    Shapes, dtypes and errors are those of :func:`softmax_ext.softmax`.
    """

    dim: int | None

    def __init__(self, dim: int | None = None) -> None:
        super().__init__(None if dim is None else checks.integer("softmax", "dim", dim))

    def forward(self, input: Tensor) -> Tensor:
        """Input of any shape -> probabilities of the same shape and dtype."""
        return functional.softmax(input, self.dim, _stacklevel=_STACKLEVEL)


@not_scriptable("torch.nn.LogSoftmax")
class LogSoftmax(nn.LogSoftmax):
    """Log-softmax over one dimension; the counterpart of :class:`torch.nn.LogSoftmax`.

    Args:
        dim: the dimension over which the exponentials of the result sum to 1; None, which is deprecated, chooses one
            as the function does.

    Shapes, dtypes and errors are those of :func:`softmax_ext.log_softmax`.
    """

    dim: int | None

    def __init__(self, dim: int | None = None) -> None:
        super().__init__(None if dim is None else checks.integer("log_softmax", "dim", dim))

    def forward(self, input: Tensor) -> Tensor:
        """Input of any shape -> log-probabilities of the same shape and dtype."""
        return functional.log_softmax(input, self.dim, _stacklevel=_STACKLEVEL)


@not_scriptable("torch.nn.CrossEntropyLoss")
class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Softmax cross entropy; the counterpart of :class:`torch.nn.CrossEntropyLoss`.

    Args:
        weight: ``(C)``, floating: a factor for each class, registered as a buffer.
        size_average: deprecated, see ``reduction``.
        ignore_index: the class index of rows that do not count.
        reduce: deprecated, see ``reduction``.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        dtype: compute and return in this dtype. Default: the input's; float32 for half types under autocast.
        z_loss: factor of the squared log-sum-exp.
        softcap: caps the logits smoothly to (-softcap, softcap); None or 0: no cap.
        logit_scale: factor of the logits.
        precompute_grad: compute the gradient in the forward pass.
        inplace: write the gradient over the logits, whose values are lost then.
        return_stats: return (loss, :class:`softmax_ext.CrossEntropyStats`).

    Shapes, formulas and errors are those of :func:`softmax_ext.cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        precompute_grad: bool = False,
        inplace: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.dtype = dtype
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.precompute_grad = precompute_grad
        self.inplace = inplace
        self.return_stats = return_stats

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        target: Tensor,
        *,
        denominator: float | Tensor | None = None,
        row_weight: Tensor | Literal["probability"] | None = None,
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        """Logits ``(N, C, ...)`` and target -> the loss, or (loss, stats) with ``return_stats``.

        ``denominator`` is what the sum of the losses is divided by, ``row_weight`` a factor of each row's loss. They
        are no options of the module, as they change with each batch.
        """
        return functional.cross_entropy(  # type: ignore[call-overload, misc, no-any-return]
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            dtype=self.dtype,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            denominator=denominator,
            row_weight=row_weight,
            precompute_grad=self.precompute_grad,
            inplace=self.inplace,
            return_stats=self.return_stats,
        )


@not_scriptable("torch.nn.Linear and torch.nn.CrossEntropyLoss")
class LinearCrossEntropyLoss(nn.Module):
    """A linear layer and the softmax cross entropy of its output; the counterpart of torch.nn.LinearCrossEntropyLoss.

    Args:
        in_features: size of a hidden state.
        num_classes: C.
        bias: whether the linear layer has a bias.
        out_features: ``(d1, ...)``, further dimensions of the logits; each position in them has its own weights.
        device: that of the parameters.
        dtype: that of the parameters.
        weight: ``(C)``, floating: a factor for each class, registered as a buffer.
        reduction: "mean", "sum" or "none".
        ignore_index: the class index of rows that do not count; None: -100 for class indices, nothing for
            probabilities.
        label_smoothing: in [0, 1].
        options: torch's chunking options, accepted and ignored.
        loss_dtype: compute and return the loss in this dtype. The matrix products are in the operands' dtype.
        z_loss: factor of the squared log-sum-exp.
        softcap: caps the logits smoothly to (-softcap, softcap); None or 0: no cap.
        logit_scale: factor of the logits.
        return_stats: return (loss, :class:`softmax_ext.CrossEntropyStats`).
        chunk_rows: the number of rows whose logits exist at once; None: the plan is chosen.
        memory: the most bytes that forward and backward may take beyond the gradients; None: as many as the plan rows
            takes by default. :func:`softmax_ext.linear_cross_entropy` has the plans.
        logits_dtype: torch.float32: logits of half types are not rounded; None: they have the operands' dtype.

    Shapes, formulas and errors are those of :func:`softmax_ext.linear_cross_entropy`. The parameters are those of
    ``self.linear``, an :class:`torch.nn.Linear`, with ``C * d1 * ...`` rows.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        *,
        out_features: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        loss_dtype: torch.dtype | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        return_stats: bool = False,
        chunk_rows: int | None = None,
        memory: int | None = None,
        logits_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        rows = num_classes * math.prod(out_features)
        self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.loss_dtype = loss_dtype
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.return_stats = return_stats
        self.chunk_rows = chunk_rows
        self.memory = memory
        self.logits_dtype = logits_dtype

    def extra_repr(self) -> str:
        """What ``print`` shows besides the linear layer."""
        limits = {"chunk_rows": self.chunk_rows, "memory": self.memory, "logits_dtype": self.logits_dtype}
        given = "".join(f", {name}={value}" for name, value in limits.items() if value is not None)
        return f"num_classes={self.num_classes}, reduction={self.reduction!r}{given}"

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        denominator: float | Tensor | None = None,
        row_weight: Tensor | Literal["probability"] | None = None,
        live_rows: int | None = None,
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        """Hidden states ``(..., in_features)`` and target -> the loss, or (loss, stats) with ``return_stats``.

        ``denominator`` is what the sum of the losses is divided by, ``row_weight`` a factor of each position's loss,
        ``live_rows`` the number of rows that are not ignored. They are no options of the module, as they change with
        each batch.
        """
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear.linear_cross_entropy(  # type: ignore[call-overload, misc, no-any-return]
            input,
            self.linear.weight.unflatten(0, shape) if self.out_features else self.linear.weight,
            target,
            linear_bias=bias.unflatten(0, shape) if bias is not None and self.out_features else bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            dtype=self.loss_dtype,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            denominator=denominator,
            row_weight=row_weight,
            live_rows=live_rows,
            return_stats=self.return_stats,
            chunk_rows=self.chunk_rows,
            memory=self.memory,
            logits_dtype=self.logits_dtype,
        )
