"""__torch_function__: subclasses of Tensor, modes and torch.fx see the public functions, as they see torch's; and
TorchScript: torch.jit.trace works, torch.jit.script says that it does not."""

import copy
import inspect
import io
import pickle
import warnings
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_unflatten

import softmax_ext
from softmax_ext import CrossEntropyStats

pytestmark = [
    pytest.mark.devices("cpu"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

H = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
W = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
X = H @ W.t()
Y = torch.tensor([0, 3, 1, 2, 0, 3])
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.5])

# By the name of the public function that each calls, with its first argument to be replaced.
CALLS = {
    "softmax": lambda x: softmax_ext.softmax(x, 1),
    "log_softmax": lambda x: softmax_ext.log_softmax(x, dim=-1, dtype=torch.float64),
    "cross_entropy": lambda x: softmax_ext.cross_entropy(x, Y, label_smoothing=0.1, z_loss=0.2),
    "linear_cross_entropy": lambda x: softmax_ext.linear_cross_entropy(x, W[:, :4], Y, softcap=3.0),
}
MODULES = {
    "softmax": softmax_ext.Softmax(1),
    "log_softmax": softmax_ext.LogSoftmax(1),
    "cross_entropy": softmax_ext.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
    "linear_cross_entropy": softmax_ext.LinearCrossEntropyLoss(4, 4),
}


class Plain(Tensor):
    pass


class Logging(Tensor):
    seen: ClassVar[list[tuple[Any, Any]]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append((func, types))
        return super().__torch_function__(func, types, args, kwargs)


class Unwrapping:
    """No Tensor, but looks like one to torch's functions."""

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def bare(value: Any) -> Any:
            return value.inside if isinstance(value, cls) else value

        result = func(*map(bare, args), **{k: bare(v) for k, v in (kwargs or {}).items()})
        return cls(result) if isinstance(result, Tensor) else result


# ---- subclasses ----


@pytest.mark.parametrize("name", CALLS)
def test_plain_subclass(name):
    """The result has the class, as of torch's functions, and the gradient is that of a Tensor."""
    x = X.clone().requires_grad_()
    sub = X.clone().as_subclass(Plain).requires_grad_()
    expected, result = CALLS[name](x), CALLS[name](sub)
    assert type(result) is Plain is type(F.softmax(sub, 1))
    assert torch.equal(result.as_subclass(Tensor), expected)
    for loss in (result, expected):
        loss.pow(2).sum().backward()
    assert torch.equal(sub.grad.as_subclass(Tensor), x.grad)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_statistics_of_a_subclass(name):
    arguments = (X,) if name == "cross_entropy" else (X, W[:, :4])
    call = getattr(softmax_ext, name)
    plain, stats = call(*arguments, Y, return_stats=True)
    loss, of_class = call(arguments[0].as_subclass(Plain), *arguments[1:], Y, return_stats=True)
    assert type(of_class) is CrossEntropyStats
    assert {type(loss), *map(type, of_class)} == {Plain}
    assert torch.equal(loss.as_subclass(Tensor), plain)
    assert all(torch.equal(a.as_subclass(Tensor), b) for a, b in zip(of_class, stats, strict=True))


def test_statistics_are_a_named_tuple():
    """Though they can be made of one iterable, too."""
    stats = softmax_ext.cross_entropy(X, Y, return_stats=True)[1]
    assert CrossEntropyStats(iter("abcd")) == CrossEntropyStats("a", "b", "c", "d") == ("a", "b", "c", "d")
    assert CrossEntropyStats(lse="a", nll="b", entropy="c", prediction="d").nll == "b"
    assert stats._replace(lse=None).lse is None
    for again in (
        pickle.loads(pickle.dumps(stats)),
        copy.deepcopy(stats),
        tree_unflatten(*reversed(tree_flatten(stats))),
    ):
        assert type(again) is CrossEntropyStats
        assert all(map(torch.equal, again, stats))


@pytest.mark.parametrize("name", CALLS)
def test_own_torch_function(name):
    """It is given the public function, so that it can tell it by identity."""
    Logging.seen.clear()
    result = CALLS[name](X.as_subclass(Logging))
    assert type(result) is Logging
    function, types = Logging.seen[0]
    assert function is getattr(softmax_ext, name)
    assert Logging in types
    unwrapped = CALLS[name](Unwrapping(X))
    assert type(unwrapped) is Unwrapping
    assert torch.equal(unwrapped.inside, CALLS[name](X))


@pytest.mark.parametrize("argument", ["target", "weight", "denominator", "row_weight", "linear_weight", "linear_bias"])
@pytest.mark.parametrize("linear", [False, True])
def test_every_tensor_argument(argument, linear):
    arguments = {
        "input": X,
        "target": Y,
        "weight": WEIGHT,
        "denominator": torch.tensor(3.0),
        "row_weight": torch.rand(6),
    }
    function = softmax_ext.cross_entropy
    if linear:
        arguments |= {"input": H, "linear_weight": W, "linear_bias": torch.rand(4)}
        function = softmax_ext.linear_cross_entropy
    elif argument.startswith("linear"):
        return
    expected = function(**arguments)
    result = function(**{**arguments, argument: Unwrapping(arguments[argument])})
    assert type(result) is Unwrapping
    assert torch.equal(result.inside, expected)


def test_not_implemented():
    class Refusing(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return NotImplemented

    with pytest.raises(TypeError, match=r"no implementation found for 'softmax_ext.functional.softmax'"):
        softmax_ext.softmax(X.as_subclass(Refusing), 1)


def test_parameters_are_tensors():
    """nn.Parameter has its __torch_function__ disabled."""
    assert type(softmax_ext.softmax(nn.Parameter(X), 1)) is Tensor


# ---- modes ----


class Recording(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_a_mode(name):
    with Recording() as mode:
        result = CALLS[name](X)
    assert mode.seen[-1] is getattr(softmax_ext, name), "and nothing inside"
    assert torch.equal(result, CALLS[name](X))


@pytest.mark.parametrize("name", CALLS)
def test_a_default_device(name):
    """It is for new tensors, and not for those that the functions make."""
    expected = CALLS[name](X)
    with torch.device("meta"):
        assert torch.equal(CALLS[name](X), expected)
        assert CALLS[name](torch.empty(6, 4)).is_meta if name.endswith("softmax") else True
        loss = softmax_ext.cross_entropy(torch.empty(3, 4), torch.empty(3, dtype=torch.int64), denominator=3.0)
    assert loss.is_meta
    torch.set_default_device("cpu")
    try:
        assert torch.equal(CALLS[name](X), expected)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_under_a_default_device(name, dynamic):
    torch.compiler.reset()
    x = X.clone().requires_grad_()
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.set_default_device("cpu")
    try:
        result = compiled(x)
    finally:
        torch.set_default_device(None)
    assert_close(result, CALLS[name](x))


# ---- torch.fx ----


class Model(nn.Module):
    def __init__(self, end: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.end = end

    def forward(self, h: Tensor) -> Tensor:
        return self.end(self.layer(h))


def assert_same(ours: nn.Module, theirs: nn.Module, h: Tensor) -> None:
    gradients = []
    for module in (ours, theirs):
        module.zero_grad()
        loss = module(h)
        loss.sum().backward()
        gradients.append([loss, *(p.grad.clone() for p in module.parameters())])
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert_close(*gradients)  # a traced linear_cross_entropy computes them in another order


class Loss(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, Y)


@pytest.mark.parametrize("by", ["function", "module"])
@pytest.mark.parametrize("name", CALLS)
def test_symbolic_trace(name, by):
    end = CALLS[name] if by == "function" else MODULES[name]
    model = Model(Loss(end) if by == "module" and "entropy" in name else end)
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets.count(getattr(softmax_ext, name)) == 1
    assert_same(traced, model, H)
    again = pickle.loads(pickle.dumps(traced))
    assert_same(again, model, H)


def test_symbolic_trace_with_statistics():
    """The result is a Proxy: it can be unpacked, and the statistics have their names."""

    def step(x: Tensor) -> Tensor:
        loss, stats = softmax_ext.cross_entropy(x, Y, return_stats=True)
        return loss + stats.lse.sum() + stats[2].mean()

    traced = torch.fx.symbolic_trace(step)
    assert torch.equal(traced(X), step(X))
    module = torch.fx.symbolic_trace(Loss(softmax_ext.CrossEntropyLoss(return_stats=True)))
    assert type(module(X)[1]) is CrossEntropyStats


# ---- TorchScript ----


def traced(model: nn.Module, h: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, h)


@pytest.mark.parametrize("by", ["function", "module"])
@pytest.mark.parametrize("name", CALLS)
def test_jit_trace(name, by):
    """The same values and gradients of another input, and after it was saved; and second derivatives."""
    end = CALLS[name] if by == "function" else MODULES[name]
    model = Model(Loss(end) if by == "module" and "entropy" in name else end)
    module = traced(model, H)
    other = torch.randn(6, 5)
    assert_same(module, model, other)
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    assert_same(torch.jit.load(file), model, other)
    with torch.no_grad():
        assert torch.equal(module(other), model(other))
    if name != "linear_cross_entropy":
        seconds = []
        for m in (module, model):
            x = other.clone().requires_grad_()
            (first,) = torch.autograd.grad(m(x).pow(2).sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
        assert_close(*seconds)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_jit_trace_with_another_batch(name):
    model = Model(CALLS[name])
    assert_same(traced(model, H), model, torch.randn(9, 5))


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_jit_trace_with_another_number_of_rows(name):
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(W.clone())

        def forward(self, h: Tensor, y: Tensor) -> Tensor:
            if name == "cross_entropy":
                return softmax_ext.cross_entropy(F.linear(h, self.weight), y)
            return softmax_ext.linear_cross_entropy(h, self.weight, y)

    step = Step()
    module = traced(step, (H, Y))
    h, y = torch.randn(9, 5), torch.randint(0, 4, (9,))
    assert torch.equal(module(h, y), step(h, y))
    gradients = [torch.autograd.grad(m(h, y), m.parameters())[0] for m in (module, step)]
    assert_close(*gradients)


SCRIPTED = {name: getattr(softmax_ext, name) for name in CALLS} | {
    type(module).__name__: module for module in MODULES.values()
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_jit_script(name):
    """One sentence says that it does not work, and what to use; inside of a model and of a function, too."""
    scripted = SCRIPTED[name]
    sentence = rf"^softmax_ext.{name} can't be compiled by torch.jit.script: use torch.nn.*, or torch.jit.trace.$"
    with pytest.raises(NotImplementedError, match=sentence):
        torch.jit.script(scripted)
    if isinstance(scripted, nn.Module):
        with pytest.raises(NotImplementedError, match=sentence):
            torch.jit.script(nn.Sequential(nn.Linear(5, 4), scripted))


def test_jit_script_of_a_call():
    def call(x: Tensor) -> Tensor:
        return softmax_ext.softmax(x, 1)

    with pytest.raises(NotImplementedError, match=r"^softmax_ext.softmax can't be compiled by torch.jit.script"):
        torch.jit.script(call)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy", "linear_cross_entropy"])
def test_every_argument_is_handed_over(name):
    """One that is forgotten would be lost to subclasses and modes in silence."""
    function, found = getattr(softmax_ext, name), []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is function:
                found.append(inspect.signature(func).bind(*args, **kwargs).arguments.keys())
            return func(*args, **(kwargs or {}))

    arguments = {"linear_weight": torch.ones(4, 4)} if name == "linear_cross_entropy" else {}
    if "cross_entropy" in name:
        arguments["target"] = torch.tensor([0, 1])
    else:
        arguments["dim"] = 1
    with Mode():
        function(torch.ones(2, 4), **arguments)
    assert set(found[0]) == set(inspect.signature(function).parameters)
