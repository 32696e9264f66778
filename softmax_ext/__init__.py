"""Fused softmax, log-softmax and softmax cross entropy for PyTorch: drop-ins for torch.nn.functional and torch.nn.

    loss = softmax_ext.cross_entropy(logits, target)

``python -m softmax_ext`` prints what was built and what runs here.
"""

import sys

from . import ops
from ._version import __version__

_diagnosing = ("-m", "softmax_ext") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
if ops.load_error is not None and not _diagnosing:
    raise ImportError(f"softmax_ext: {ops.load_error} (python -m softmax_ext tells more)")

from . import flops  # noqa: E402, F401
from .causal_lm import CausalLMStats, causal_lm_loss  # noqa: E402
from .functional import CrossEntropyStats, cross_entropy, log_softmax, softmax  # noqa: E402
from .linear import linear_cross_entropy  # noqa: E402
from .modules import CrossEntropyLoss, LinearCrossEntropyLoss, LogSoftmax, Softmax  # noqa: E402
from .patch import Patch, PatchReport, patch, unpatch  # noqa: E402
from .plans import LinearPlan, linear_plan  # noqa: E402

__all__ = [
    "CausalLMStats",
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "LinearCrossEntropyLoss",
    "LinearPlan",
    "LogSoftmax",
    "Patch",
    "PatchReport",
    "Softmax",
    "__version__",
    "causal_lm_loss",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_plan",
    "log_softmax",
    "patch",
    "softmax",
    "unpatch",
]
