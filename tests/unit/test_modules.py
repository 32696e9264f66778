"""The modules: signatures, defaults, attributes, buffers and state are those of torch.nn; our options come after."""

import inspect
from typing import Any

import pytest
import seeded
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import softmax_ext
from softmax_ext import CrossEntropyLoss, LogSoftmax, Softmax

OPTIONS = {
    "dtype": None,
    "z_loss": 0.0,
    "softcap": None,
    "logit_scale": 1.0,
    "precompute_grad": False,
    "inplace": False,
    "return_stats": False,
}
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
X = seeded.randn(3, 4)
Y = torch.tensor([0, 3, 2])


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(CrossEntropyLoss, nn.CrossEntropyLoss), (softmax_ext.cross_entropy, F.cross_entropy)],
    ids=["module", "function"],
)
def test_signature_of_cross_entropy(ours, theirs):
    """Torch's parameters, position by position and with torch's defaults; then ours, by name only."""
    our, their = parameters(ours), parameters(theirs)
    shared = [name for name in their if name not in ("device", "dtype")]
    assert list(our)[: len(shared)] == shared
    for name in shared:
        assert our[name].default == their[name].default, name
        assert our[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
    rest = {name: p for name, p in our.items() if name not in shared}
    of_a_call = {} if ours is CrossEntropyLoss else {"denominator": None, "row_weight": None}
    assert {name: p.default for name, p in rest.items()} == {**OPTIONS, **of_a_call}
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in rest.values())


@pytest.mark.parametrize("module", [Softmax, LogSoftmax])
def test_signature_of_softmax_modules(module):
    assert list(parameters(module)) == ["dim"]
    assert module(1).dim == module(dim=1).dim == 1
    assert module().dim is None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(CrossEntropyLoss, nn.CrossEntropyLoss), (Softmax, nn.Softmax), (LogSoftmax, nn.LogSoftmax)],
    ids=["CrossEntropyLoss", "Softmax", "LogSoftmax"],
)
def test_is_a_torch_module(ours, theirs):
    """Code that looks for torch's loss by its type finds ours."""
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__


def test_defaults():
    ours, theirs = CrossEntropyLoss(), nn.CrossEntropyLoss()
    for name in ("weight", "ignore_index", "reduction", "label_smoothing"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert {name: getattr(ours, name) for name in OPTIONS} == OPTIONS
    assert_close(ours(X, Y), theirs(X, Y))


def test_every_argument_reaches_the_function():
    """Each option changes the loss, or what is returned, as the function's own does."""
    plain = CrossEntropyLoss()(X, Y)
    for name, value in {
        "weight": WEIGHT,
        "ignore_index": 3,
        "reduction": "sum",
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "softcap": 1.5,
        "logit_scale": 0.7,
        "dtype": torch.float32,
    }.items():
        module = CrossEntropyLoss(**{name: value})
        assert getattr(module, name) is value
        loss = module(X, Y)
        assert torch.equal(loss, softmax_ext.cross_entropy(X, Y, **{name: value}))
        assert loss.dtype != plain.dtype or not torch.equal(loss, plain)
    loss, stats = CrossEntropyLoss(return_stats=True)(X, Y)
    assert isinstance(stats, softmax_ext.CrossEntropyStats)
    assert torch.equal(loss, plain)


@pytest.mark.parametrize("precompute_grad", [False, True])
def test_inplace_reaches_the_function(precompute_grad):
    logits = X.clone().requires_grad_() * 1
    version = logits._version
    CrossEntropyLoss(inplace=True, precompute_grad=precompute_grad)(logits, Y).backward()
    assert logits._version > version


def test_precompute_grad_reaches_the_function():
    """The gradient is that of the forward's logits, even if they have changed since."""
    x = X.clone().requires_grad_()
    logits = x * 1
    loss = CrossEntropyLoss(precompute_grad=True)(logits, Y)
    logits.detach().zero_()
    loss.backward()
    other = X.clone().requires_grad_()
    F.cross_entropy(other, Y).backward()
    assert_close(x.grad, other.grad)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_arguments(reduce, size_average):
    """By position, as old code has them."""
    ours = CrossEntropyLoss(WEIGHT, size_average, -100, reduce)
    theirs = nn.CrossEntropyLoss(WEIGHT, size_average, -100, reduce)
    assert ours.reduction == theirs.reduction
    assert_close(ours(X, Y), theirs(X, Y))
    arguments = (X, Y, WEIGHT, size_average, -100, reduce)
    assert_close(softmax_ext.cross_entropy(*arguments), F.cross_entropy(*arguments))


def test_deprecated_arguments_warn():
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        softmax_ext.cross_entropy(X, Y, reduce=True)


# ---- state ---------------------------------------------------------------------------------------------------------


def test_weight_is_a_buffer():
    module = CrossEntropyLoss(WEIGHT)
    assert dict(module.named_buffers()).keys() == {"weight"}
    assert not list(module.parameters())
    assert list(module.state_dict()) == list(nn.CrossEntropyLoss(WEIGHT).state_dict()) == ["weight"]
    assert list(CrossEntropyLoss().state_dict()) == list(nn.CrossEntropyLoss().state_dict()) == []


def test_conversions_take_the_weight_along():
    module = CrossEntropyLoss(WEIGHT, dtype=torch.float64)
    assert module.to(torch.float32).weight.dtype == torch.float32
    assert module.half().weight.dtype == torch.float16
    assert module.double().weight.dtype == torch.float64
    assert module.to("meta").weight.is_meta
    assert module.dtype == torch.float64, "the loss's dtype is an option, not the module's"


def test_weight_of_another_dtype():
    """A model in half precision may keep its weights in float32; torch refuses this."""
    x = X.bfloat16()
    loss = CrossEntropyLoss(WEIGHT.float(), dtype=torch.float64)(x, Y)
    assert_close(loss, F.cross_entropy(x.double(), Y, WEIGHT))


# ---- repr ----------------------------------------------------------------------------------------------------------


def test_repr_of_softmax():
    assert repr(Softmax(dim=-1)) == repr(nn.Softmax(dim=-1)) == "Softmax(dim=-1)"
    assert repr(LogSoftmax(dim=1)) == repr(nn.LogSoftmax(dim=1)) == "LogSoftmax(dim=1)"


def test_repr_in_a_model():
    ours, theirs = (nn.Sequential(nn.Linear(2, 3), m.LogSoftmax(1), m.CrossEntropyLoss()) for m in (softmax_ext, nn))
    assert repr(ours) == repr(theirs)


def test_public_names():
    """What the package offers, and nothing by accident."""
    assert set(softmax_ext.__all__) == {
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
    }
    assert all(hasattr(softmax_ext, name) for name in softmax_ext.__all__)
    assert softmax_ext.CrossEntropyStats._fields == ("lse", "nll", "entropy", "prediction")
