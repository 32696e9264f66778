"""Every derivative through every wrapper: right, or an exception; never silently wrong.

A wrapper is what stands between a function of this package and whoever differentiates it: torch.compile with each
backend, torch.export, checkpoints, compiled autograd. A derivative is asked for from outside of it. What is right is
taken from eager code, which other tests hold against torch. ``torch.func`` within compiled code is in test_compile.py.

This torch's own compiled code is silently wrong in some of these cells, and in more before 2.13: see
softmax_ext/autograd/refusals.py.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fresh
import pytest
import seeded
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor, nn
from torch.autograd import functional, grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import softmax_ext
from softmax_ext import cross_entropy, internals, linear_cross_entropy

Function = Callable[[Tensor], Tensor]

X, TANGENT = seeded.randn(3, 4), seeded.randn(3, 4, seed=1)
Y = torch.tensor([0, 3, 2])
CLASSES = seeded.randn(5, 4, seed=2)
Q = seeded.randn(3, 4, seed=3).softmax(1)


def total(values: Tensor) -> Tensor:
    """A sum with another factor for each value."""
    return (values * torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).view_as(values)).sum()


def statistics(results: tuple[Tensor, softmax_ext.CrossEntropyStats]) -> Tensor:
    return total(torch.stack(list(results[1][:3])))


# The result of the last is the result of the kernel itself, which torch keeps for the backward by another name.
FUNCTIONS: dict[str, Function] = {
    "cross_entropy": lambda x: cross_entropy(x, Y),
    "rows": lambda x: cross_entropy(x, Y, reduction="none"),
    "probabilities": lambda x: cross_entropy(x, x.square()),
    "class weights": lambda x: cross_entropy(x, Q, x[0].square() + 0.5),
    "statistics": lambda x: statistics(cross_entropy(x, Y, return_stats=True)),
    "linear": lambda x: linear_cross_entropy(x, CLASSES, Y),
    "linear rows": lambda x: linear_cross_entropy(x, CLASSES, Y, reduction="none"),
    "linear statistics": lambda x: statistics(linear_cross_entropy(x, CLASSES, Y, return_stats=True)),
    "log_softmax": lambda x: softmax_ext.log_softmax(x, 1)[:, 0].square().sum(),
    "softmax": lambda x: softmax_ext.softmax(x, 1)[:, 0].square().sum(),
    "softmax alone": lambda x: softmax_ext.softmax(x, 1),
}

# ---- derivatives ----------------------------------------------------------------------------------------------------


def leaf() -> Tensor:
    return X.clone().requires_grad_()


def penalised(f: Function, ask: Callable[[Tensor, Tensor], Tensor | None]) -> Tensor | None:
    """A loss with a gradient penalty; its derivative as ``ask`` gets it."""
    x = leaf()
    loss = total(f(x))
    (gradient,) = grad(loss, x, create_graph=True)
    return ask(loss + gradient.square().sum(), x)


def backward(loss: Tensor, x: Tensor) -> Tensor | None:
    loss.backward()
    return x.grad


def of_upstream(f: Function) -> tuple[Tensor | None, ...]:
    """The derivative in an upstream gradient."""
    x = leaf()
    results = f(x)
    upstream = torch.ones_like(results).requires_grad_()
    (gradient,) = grad(results, x, upstream, create_graph=True)
    (total(results) + gradient.square().sum()).backward()
    return upstream.grad, x.grad


def tangent(value: Tensor) -> Tensor:
    """Forward mode takes no tangent for a tangent of 0."""
    found = fw.unpack_dual(value).tangent
    return torch.zeros_like(value) if found is None else found


def forward(f: Function, x: Tensor | None = None) -> Tensor:
    with fw.dual_level():
        return tangent(f(fw.make_dual(leaf() if x is None else x, TANGENT)))


def forward_over_reverse(f: Function) -> Tensor:
    with fw.dual_level():
        x = fw.make_dual(leaf(), TANGENT)
        return tangent(grad(total(f(x)), x)[0])


def tangent_of_upstream(f: Function) -> Tensor:
    x = leaf()
    results = f(x)
    with fw.dual_level():
        upstream = fw.make_dual(torch.ones_like(results), torch.full_like(results, 0.3))
        return tangent(grad(results, x, upstream)[0])


def batched(f: Function, penalty: bool = False) -> Tensor | None:
    x = leaf()
    results = f(x)
    upstream = torch.stack([torch.ones_like(results), torch.full_like(results, 0.2)])
    (gradients,) = grad(results, x, upstream, is_grads_batched=True, create_graph=penalty)
    return backward(total(results) + gradients.square().sum(), x) if penalty else gradients


DERIVATIVES: dict[str, Callable[[Function], Any]] = {
    "gradient": lambda f: grad(total(f(x := leaf())), x),
    "gradient penalty": lambda f: penalised(f, backward),
    "gradient penalty, grad": lambda f: penalised(f, lambda loss, x: grad(loss, x)[0]),
    "upstream gradient": of_upstream,
    "hessian": lambda f: functional.hessian(lambda x: total(f(x)), X),
    "hessian, vectorized": lambda f: functional.hessian(lambda x: total(f(x)), X, vectorize=True),
    "forward": forward,
    "forward, nothing requires grad": lambda f: forward(f, X),
    "forward over reverse": forward_over_reverse,
    "tangent of the upstream gradient": tangent_of_upstream,
    "batched": batched,
    "batched, penalty": lambda f: batched(f, penalty=True),
}

# ---- wrappers -------------------------------------------------------------------------------------------------------


class Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def compiled(backend: str) -> Callable[[Function], Function]:
    return lambda f: torch.compile(f, backend=backend, fullgraph=True)


def checkpointed(f: Function) -> Function:
    return lambda x: checkpoint(f, x, use_reentrant=False)


def exported(f: Function) -> Function:
    return torch.export.export(Module(f), (leaf(),)).module()


WRAPPERS: dict[str, Callable[[Function], Function]] = {
    "eager": compiled("eager"),
    "aot_eager": compiled("aot_eager"),
    "export": exported,
    "checkpoint": checkpointed,
    "compiled checkpoint": lambda f: compiled("aot_eager")(checkpointed(f)),
    "checkpoint of compiled": lambda f: checkpointed(compiled("aot_eager")(f)),
    "compiled autograd": lambda f: f,
}
IN_INDUCTOR = ("cross_entropy", "class weights", "linear", "softmax")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Torch refuses create_graph=True by default where a buffer is used again; its text says how to switch that off."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def compiled_autograd(wrapper: str) -> contextlib.AbstractContextManager[Any]:
    if wrapper != "compiled autograd":
        return contextlib.nullcontext()
    return torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))


def outcome(derivative: Callable[[], Any], expected: Any) -> str:
    """ "right", "wrong" or the text of an exception."""
    try:
        found = derivative()
    except (AttributeError, NameError):  # a mistake of ours
        raise
    except Exception as error:  # whichever: each part of torch has its own
        return str(error) or type(error).__name__
    try:
        assert_close(found, expected)
    except AssertionError:
        return "wrong"
    return "right"


def outcomes(wrapper: str, wrap: Callable[[Function], Function], name: str) -> dict[str, str]:
    function = FUNCTIONS[name]
    wrapped = wrap(function)
    found = {}
    for derivative, of in DERIVATIVES.items():
        expected = of(function)
        with compiled_autograd(wrapper):
            found[derivative] = outcome(lambda: of(wrapped), expected)  # noqa: B023
    return found


TWICE = ("gradient penalty", "gradient penalty, grad", "upstream gradient", "hessian", "hessian, vectorized")
REFUSED = "the backward of compiled code can't be differentiated again"


# Compiled autograd compiles each derivative of each call anew.
EACH_WRAPPER = [pytest.param(w, marks=pytest.mark.slow) if w == "compiled autograd" else w for w in WRAPPERS]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("wrapper", EACH_WRAPPER)
def test_right_or_refused(wrapper, name):
    found = outcomes(wrapper, WRAPPERS[wrapper], name)
    assert "wrong" not in found.values(), found
    assert found["gradient"] == "right"
    if wrapper in ("aot_eager", "checkpoint of compiled"):
        assert all(REFUSED in found[derivative] for derivative in TWICE), found
    if wrapper == "aot_eager":
        assert "has no derivative in forward mode" in found["tangent of the upstream gradient"]
    if wrapper == "export":
        assert "has no derivative in forward mode" in found["forward, nothing requires grad"]
    if wrapper in ("eager", "export", "checkpoint"):
        assert all(found[derivative] == "right" for derivative in TWICE), found


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_INDUCTOR)
def test_right_or_refused_by_inductor(name):
    found = outcomes("inductor", compiled("inductor"), name)
    assert found["gradient"] == "right"
    assert all(REFUSED in found[derivative] for derivative in TWICE), found
    assert {derivative for derivative, what in found.items() if what == "wrong"} <= {"forward, nothing requires grad"}


@pytest.mark.slow
@pytest.mark.parametrize("softmax", [softmax_ext.softmax, torch.softmax])
def test_what_inductor_loses(softmax):
    """Before 2.14, which does not compile such a call: the tangent of what it is given, torch's own functions too."""
    function = torch.compile(lambda x: softmax(x, 1))
    with fw.dual_level():
        found = fw.unpack_dual(function(fw.make_dual(X, TANGENT))).tangent
    if torch.__version__ < (2, 14):
        assert found is None
    else:
        assert_close(found, forward(lambda x: softmax(x, 1), X))


# ---- not compiled, but traced ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "linear", "softmax"])
def test_a_gradient_that_is_traced_into_other_code(name):
    """Nothing is differentiated twice there, whether grad mode is on or not."""
    step = make_fx(lambda x: grad(total(FUNCTIONS[name](x)), x)[0], tracing_mode="fake", _allow_non_fake_inputs=True)(
        leaf()
    )
    assert_close(step(X), grad(total(FUNCTIONS[name](x := leaf())), x)[0])


def test_a_backward_under_any_grad_mode():
    function = torch.compile(FUNCTIONS["softmax"], backend="aot_eager")
    for mode in (torch.enable_grad, torch.no_grad):
        x = leaf()
        loss = function(x)
        with mode():
            loss.backward()
        assert_close(x.grad, grad(FUNCTIONS["softmax"](y := leaf()), y)[0])


# ---- torch's inside -------------------------------------------------------------------------------------------------


def test_this_torch_has_all_that_is_taken_from_its_inside():
    """Where it lacks one, the package does without, by a slower way or a refusal: see softmax_ext/internals.py."""
    missing = internals.missing()
    assert not missing, "\n".join(f"{i.name}, for {i.purpose}; without it: {i.without}" for i in missing)


PRIVATE = re.compile(r"torch\.(\w+\.)*_(?!_)|\b_C\.|forward_ad\._|\._base\b")


def test_torchs_inside_is_named_in_one_place():
    package = Path(softmax_ext.__file__).parent
    found = [
        f"{path.name}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name != "internals.py"
        for line in path.read_text().splitlines()
        if PRIVATE.search(line)
    ]
    assert not found
    assert PRIVATE.search((package / "internals.py").read_text()), "nothing would be found"


WITHOUT = """
import functools
def hide(function, *arguments, real=functools.reduce):
    if function is getattr:
        raise AttributeError
    return real(function, *arguments)
import torch, torch._dynamo, torch.nn.functional as F
from torch.testing import assert_close
real, functools.reduce = functools.reduce, hide
import softmax_ext as s
functools.reduce = real
assert s.functional.internals.onednn_linear is None, "nothing is hidden"
torch.manual_seed(0)
W, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 2])
pairs = {
    "cross_entropy": (lambda x: s.cross_entropy(x, y), lambda x: F.cross_entropy(x, y)),
    "legacy": (lambda x: s.cross_entropy(x, y, None, False), lambda x: F.cross_entropy(x, y, reduction="sum")),
    "precomputed": (lambda x: s.cross_entropy(x, y, precompute_grad=True), lambda x: F.cross_entropy(x, y)),
    "inplace": (lambda x: s.cross_entropy(x * 1, y, inplace=True), lambda x: F.cross_entropy(x, y)),
    "softmax": (lambda x: s.softmax(x, 1).square().sum(), lambda x: F.softmax(x, 1).square().sum()),
    "linear": (lambda x: s.linear_cross_entropy(x, W, y), lambda x: F.cross_entropy(x @ W.mT, y)),
    "linear float32": (lambda x: s.linear_cross_entropy(x.float(), W.float(), y).double(),
                       lambda x: F.cross_entropy(x.float() @ W.mT.float(), y).double()),
}
def derivatives(f):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    (f(x) + g.square().sum()).backward()
    return g, x.grad, torch.func.vmap(torch.func.grad(f))(torch.stack([x.detach(), x.detach() * 2]))
for name, (ours, torchs) in pairs.items():
    assert_close(derivatives(ours), derivatives(torchs), check_dtype=False, msg=lambda text: f"{name}: {text}")
print("done")
"""


def test_without_anything_of_torchs_inside():
    """Slower or refused, and right; never an AttributeError."""
    assert fresh.output(WITHOUT).endswith("done\n")
