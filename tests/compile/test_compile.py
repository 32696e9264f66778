"""torch.compile, torch.export and the operators without data: right, or an exception; never silently wrong.

Compiled code is compared with eager code of this package, whose values other tests hold against torch. Most of it is
compiled with the backend "aot_eager", which traces like the default one (graphs, fake tensors, functionalisation,
joint forward and backward) without a C++ compiler at the end; some with inductor itself.
"""

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import randint, randn
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import softmax_ext
from softmax_ext import CrossEntropyLoss, cross_entropy
from softmax_ext.options import Options

OPS = torch.ops.softmax_ext


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert enabled, "the test left the grad mode switched off"


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Fullgraph: a graph break raises."""
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


def values_and_gradients(function: Callable[..., Any], *args: Tensor) -> tuple[Any, list[Tensor | None]]:
    """The results of the function, and the gradients of their weighted sum to the arguments that can have one."""
    args = tuple(a.detach().clone().requires_grad_(a.is_floating_point()) for a in args)
    results = function(*args)
    leaves = [t for t in torch.utils._pytree.tree_leaves(results) if t.is_floating_point()]
    upstream = [torch.linspace(0.5, i + 1.5, t.numel(), dtype=t.dtype).view_as(t) for i, t in enumerate(leaves)]
    torch.autograd.backward(leaves, upstream)
    return torch.utils._pytree.tree_map(torch.Tensor.detach, results), [a.grad for a in args]


def same(function: Callable[..., Any], *args: Tensor, **options: Any) -> None:
    assert_close(values_and_gradients(compiled(function, **options), *args), values_and_gradients(function, *args))


Y = torch.tensor([0, 3, 2])
W = randn(4, seed=2).abs() + 0.5
ALL: dict[str, Any] = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 1.5, "logit_scale": 0.7}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": W},
    "ignore_index": {"ignore_index": 3},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "all": {"weight": W, "reduction": "sum", **ALL},
    "statistics": {"return_stats": True, **ALL},
    "float32": {"dtype": torch.float32},
}


# ---- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_cross_entropy(kind, dynamic, options):
    target = Y if kind == "classes" else randn(3, 4, seed=1).softmax(1)
    options = {k: v for k, v in options.items() if kind == "classes" or k != "ignore_index"}
    same(lambda x, y: cross_entropy(x, y, **options), randn(3, 4), target, dynamic=dynamic)


@pytest.mark.parametrize("shape", [(4,), (2, 40), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_shapes(shape, dynamic):
    batch = shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
    target = randint(4, batch)
    same(lambda x, y: cross_entropy(x, y, return_stats=True), randn(*shape), target, dynamic=dynamic)


def test_transposed_logits():
    same(lambda x, y: cross_entropy(x.transpose(1, 2), y), randn(2, 3, 4), torch.tensor([[0, 1, 2], [3, 2, 1]]))


def test_expanded_logits():
    same(lambda x, y: cross_entropy(x.expand(3, 4), y), randn(4), Y)


STRATEGIES = [{"precompute_grad": True}, {"inplace": True}, {"inplace": True, "precompute_grad": True}]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_strategies_change_nothing(dynamic, backend, strategy):
    """Even where the logits are needed afterwards, which eager code with inplace refuses."""

    def loss(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        logits = x.exp()
        return cross_entropy(logits, y, **options) + logits.square().sum()

    f = compiled(lambda x, y: loss(x, y, **strategy), backend=backend, dynamic=dynamic)
    actual = values_and_gradients(f, randn(3, 4), Y)
    assert_close(actual, values_and_gradients(loss, randn(3, 4), Y))


@pytest.mark.parametrize("function", [softmax_ext.softmax, softmax_ext.log_softmax])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax(dim, dynamic, function):
    same(lambda x: function(x, dim), randn(2, 4, 3), dynamic=dynamic)


@pytest.mark.parametrize("function", [softmax_ext.softmax, softmax_ext.log_softmax])
def test_softmax_of_another_dtype(function):
    same(lambda x: function(x, 1, dtype=torch.float32), randn(3, 40, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    same(lambda x, y: cross_entropy(x, y, return_stats=True), randn(3, 4, dtype=dtype), Y)


def test_without_grad():
    f = compiled(lambda x, y: (cross_entropy(x, y), softmax_ext.softmax(x, 1)))
    with torch.no_grad():
        loss, probabilities = f(randn(3, 4), Y)
    assert not loss.requires_grad
    assert_close(loss, cross_entropy(randn(3, 4), Y))
    assert_close(probabilities, softmax_ext.softmax(randn(3, 4), 1))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_gradient_to_one_operand_only(needs):
    x, q = (t.requires_grad_(n) for t, n in zip((randn(3, 4), randn(3, 4, seed=1).softmax(1)), needs, strict=True))
    compiled(cross_entropy)(x, q).backward()
    other = [t.detach().clone().requires_grad_(n) for t, n in zip((x, q), needs, strict=True)]
    cross_entropy(*other).backward()
    assert_close([x.grad, q.grad], [t.grad for t in other])


def test_weight_gets_a_gradient_with_probabilities():
    same(cross_entropy, randn(3, 4), randn(3, 4, seed=1).softmax(1), W)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_statistics_with_a_gradient_for_the_weight(backend):
    """By the plain formulas, which Dynamo traces."""
    operands = [randn(3, 4), randn(3, 4, seed=1).softmax(1), randn(4, seed=2).exp()]
    operands = [t.detach().requires_grad_() for t in operands]

    def f(x: Tensor, q: Tensor, w: Tensor) -> Tensor:
        loss, stats = cross_entropy(x, q, w, label_smoothing=0.1, z_loss=0.1, softcap=3.0, return_stats=True)
        return loss + stats.lse.sum() + 2 * stats.nll.sum() + 3 * stats.entropy.sum()

    grads = [torch.autograd.grad(g(*operands), operands) for g in (f, compiled(f, backend=backend))]
    assert_close(*grads)


@pytest.mark.parametrize("module", [CrossEntropyLoss(W, **ALL), CrossEntropyLoss(return_stats=True)], ids=str)
def test_loss_modules(module):
    same(module, randn(3, 4), Y)


@pytest.mark.parametrize("module", [softmax_ext.Softmax(1), softmax_ext.LogSoftmax(0)], ids=str)
def test_softmax_modules(module):
    same(module, randn(3, 4))


def test_autocast():
    def f(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(Y.device.type, torch.bfloat16):
            return cross_entropy(x, y)

    x = randn(3, 4, dtype=torch.bfloat16)
    assert compiled(f)(x, Y).dtype == f(x, Y).dtype == torch.float32
    same(f, x, Y)


# ---- with inductor, as users have it -------------------------------------------------------------------------------


@pytest.mark.slow
def test_inductor():
    def f(x: Tensor, y: Tensor) -> Any:
        loss, stats = cross_entropy(x * 2, y, weight=W.to(x.dtype), return_stats=True, **ALL)
        return loss, stats.entropy.mean(), softmax_ext.softmax(x + 1, 1)

    same(f, randn(3, 4), Y, backend="inductor")


def train(loss_function: Callable[..., Tensor], compiler: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Four steps of a small model, the whole forward compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = compiler(lambda x, y: loss_function(model(x), y))
    losses = []
    for i in range(4):
        optimizer.zero_grad()
        loss = step(randn(6, 5, seed=i), torch.arange(6) % 4)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.detach() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{}, *STRATEGIES], ids=str)
def test_training(strategy):
    """Compiled, or not, it is torch's own training run."""
    expected = train(F.cross_entropy, lambda f: f)
    backend = "aot_eager" if strategy else "inductor"
    assert_close(train(CrossEntropyLoss(**strategy), lambda f: compiled(f, backend=backend)), expected)
    assert_close(train(CrossEntropyLoss(**strategy), lambda f: f), expected)


# ---- graphs --------------------------------------------------------------------------------------------------------


def test_one_graph_of_one_operator():
    """No graph breaks, and the loss is one call: neither decomposed nor surrounded by copies."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(softmax_ext.log_softmax(x, 1), y, weight=W, **ALL)

    report = torch._dynamo.explain(f)(randn(3, 4).requires_grad_(), Y)
    assert report.graph_break_count == 0
    assert report.graph_count == 1
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        compiled(f, backend=backend)(randn(3, 4), Y)
    (graph,) = graphs
    targets = [
        str(node.target) for module in graph.modules() for node in module.graph.nodes if node.op == "call_function"
    ]
    assert sum("softmax_ext" in t for t in targets) == 2
    tensor_functions = [t for t in targets if "_are_functorch_transforms_active" not in t]
    assert not [t for t in tensor_functions if "aten" in t or t.startswith("<built-in method")], targets


@pytest.mark.parametrize("function", [cross_entropy, lambda x, y: softmax_ext.softmax(x, 1)], ids=["loss", "softmax"])
def test_no_recompilation_for_another_number_of_rows(function):
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(function, backend=counter, dynamic=True)
    counts = set()
    for rows in (3, 5, 17, 1000, 4):
        x, y = randn(rows, 4).requires_grad_(), torch.arange(rows) % 4
        assert_close(f(x, y), function(x, y))
        f(x, y).sum().backward()
        counts.add(counter.frame_count)
    assert len(counts) == 1, counts


def test_one_recompilation_without_dynamic():
    """Torch makes the changing size dynamic at its second value."""
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(cross_entropy, backend=counter)
    for rows in (3, 5, 17, 1000):
        f(randn(rows, 4).requires_grad_(), torch.arange(rows) % 4).backward()
    assert counter.frame_count == 2, counter.frame_count


def test_no_recompilation_for_another_size_of_everything():
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(cross_entropy, backend=counter, dynamic=True)
    counts = set()
    for rows, classes, pixels in ((3, 4, 5), (2, 40, 3), (7, 9, 11)):
        x = randn(rows, classes, pixels).requires_grad_()
        y = torch.arange(rows * pixels).view(rows, pixels) % classes
        assert_close(f(x, y), cross_entropy(x, y))
        counts.add(counter.frame_count)
    assert len(counts) == 1, counts


HEAD = randn(4, 4, seed=5)
DENOMINATED: dict[str, Callable[..., Tensor]] = {
    "logits": lambda x, d: cross_entropy(x * 1, Y, denominator=d, z_loss=0.1),
    "inplace": lambda x, d: cross_entropy(x * 1, Y, denominator=d, inplace=True, precompute_grad=True),
    "linear": lambda x, d: softmax_ext.linear_cross_entropy(x, HEAD, Y, denominator=d, chunk_rows=2),
    "module": lambda x, d: CrossEntropyLoss(W)(x, Y, denominator=d),
}
each_denominated = pytest.mark.parametrize("function", DENOMINATED.values(), ids=DENOMINATED)


def frames_for(function: Callable[..., Tensor], denominators: list[Any], backend: str, **options: Any) -> list[int]:
    """How often it has been compiled after each of the denominators; compares results and gradients."""
    counter = CompileCounterWithBackend(backend)
    f, counts = compiled(function, backend=counter, **options), []
    for denominator in denominators:
        results = []
        for call in (f, function):
            x = randn(3, 4).requires_grad_()
            loss = call(x, denominator)
            results.append((loss.detach(), torch.autograd.grad(loss, x)))
        assert_close(*results)
        counts.append(counter.frame_count)
    return counts


NUMBERS = pytest.mark.parametrize("numbers", [[3, 5, 17, 1000], [3.5, 5.25, 17.75, 1000.5]], ids=["int", "float"])


@each_denominated
@NUMBERS
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_a_denominator_that_changes(dynamic, numbers, function):
    """Torch compiles for a number, and then once more for any."""
    counts = frames_for(function, numbers, "aot_eager", dynamic=dynamic)
    assert len(set(counts[1:])) == 1, counts


@each_denominated
@pytest.mark.parametrize("like", [torch.tensor(1), torch.tensor([1.0]), torch.tensor(1.0).double()], ids=repr)
def test_a_tensor_as_denominator(like, function):
    counts = frames_for(function, [3 * like, 5 * like, 17 * like], "aot_eager")
    assert len(set(counts)) == 1, counts


@pytest.mark.parametrize("name", ["logits", "linear"])
def test_denominators_by_inductor(name):
    for numbers in ([3, 5, 17], [3.5, 5.25, 17.75], [torch.tensor(3), torch.tensor(5), torch.tensor(17)]):
        counts = frames_for(DENOMINATED[name], numbers, "inductor")
        assert len(set(counts[1:])) == 1, counts


@each_denominated
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
def test_a_denominator_within_a_compiled_transform(transform, function):
    if function is DENOMINATED["linear"]:
        function = lambda x, d: softmax_ext.linear_cross_entropy(x, HEAD, Y, denominator=d)  # noqa: E731
    for denominator in (3, torch.tensor(4.5)):
        actual = compiled(lambda x, d: transform(function)(x, d))(randn(3, 4), denominator)
        assert_close(actual, transform(function)(randn(3, 4), denominator))


def test_a_batch_of_denominators_in_compiled_code():
    x = randn(3, 4)

    def function(d: Tensor) -> Tensor:
        return torch.func.vmap(lambda d: cross_entropy(x, Y, denominator=d))(d)

    d = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert_close(compiled(function)(d), cross_entropy(randn(3, 4), Y, reduction="sum") / d)


# ---- what compiled code cannot do ----------------------------------------------------------------------------------

CLASSES = randn(5, 4, seed=3)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda x: cross_entropy(x * 1, Y),
    "linear": lambda x: softmax_ext.linear_cross_entropy(x * 1, CLASSES, Y),
    "softmax": lambda x: softmax_ext.softmax(x * 1, 1)[:, 0].square().sum(),
    "log_softmax": lambda x: softmax_ext.log_softmax(x * 1, 1)[:, 0].square().sum(),
}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
each_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


def right_or_raises(actual: Callable[[], Any], expected: Any) -> None:
    try:
        value = actual()
    except AssertionError:
        raise
    except Exception:  # whichever: each part of torch.compile has its own
        return
    assert_close(value, expected)


@each_function
@each_backend
def test_double_backward_through_compiled_code(backend, function):
    """A gradient penalty outside of the compiled function."""

    def penalised(f: Callable[[Tensor], Tensor]) -> Tensor:
        x = randn(3, 4).requires_grad_()
        loss = f(x)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.square().sum()).backward()
        return x.grad

    right_or_raises(lambda: penalised(compiled(function, backend=backend)), penalised(function))


@each_function
@each_backend
def test_second_derivatives_inside_compiled_code(backend, function):
    """A gradient penalty inside."""
    from torch.func import grad

    def penalty(x: Tensor) -> Tensor:
        return grad(lambda x: function(x) + grad(function)(x).square().sum())(x)

    right_or_raises(lambda: compiled(penalty, backend=backend)(randn(3, 4)), penalty(randn(3, 4)))


@each_function
@each_backend
def test_hessian_inside_compiled_code(backend, function):
    from torch.func import hessian, jacrev

    for twice in (hessian(function), jacrev(jacrev(function))):
        right_or_raises(lambda: compiled(lambda x: twice(x), backend=backend)(randn(3, 4)), twice(randn(3, 4)))  # noqa: B023


@each_function
@each_backend
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "vmap grad"])
def test_transforms_inside_compiled_code(transform, backend, function):
    from torch.func import grad, jvp, vmap

    x, v = randn(3, 4), randn(3, 4, seed=1)
    call = {
        "grad": lambda x: grad(function)(x),
        "jvp": lambda x: jvp(function, (x,), (v,)),
        "vmap": lambda x: vmap(function)(torch.stack([x, v])),
        "vmap grad": lambda x: vmap(grad(function))(torch.stack([x, v])),
    }[transform]
    right_or_raises(lambda: compiled(call, backend=backend)(x), call(x))


TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda x: F.cross_entropy(x, Y),
    "linear": lambda x: F.cross_entropy(x @ CLASSES.mT, Y),
    "softmax": lambda x: F.softmax(x, 1)[:, 0].square().sum(),
    "log_softmax": lambda x: F.log_softmax(x, 1)[:, 0].square().sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@each_backend
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap grad", "hessian"])
def test_transforms_inside_compiled_code_are_torchs(transform, backend, name, device):
    """Not refused: compiled as a whole, and right. (`device`: so that there is no default device.)"""
    from torch.func import grad, hessian, jvp, vmap

    x, v = randn(3, 4).to(device), randn(3, 4, seed=1).to(device)
    arguments = (torch.stack([x, v]),) if transform == "vmap grad" else (x,)
    transformed = {
        "grad": grad,
        "jvp": lambda f: lambda x: jvp(f, (x,), (v,)),
        "vmap grad": lambda f: vmap(grad(f)),
        "hessian": hessian,
    }[transform]
    actual = compiled(transformed(FUNCTIONS[name]), backend=backend)(*arguments)
    assert_close(actual, transformed(TORCHS[name])(*arguments))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hessian_under_a_default_device(name, device):
    """Which Dynamo traces; where it can't (2.11), neither can it with torch's function."""
    from torch.func import hessian

    x = randn(3, 4).to(device)
    expected = hessian(TORCHS[name])(x)
    with torch.device(device):
        try:
            compiled(hessian(TORCHS[name]))(x)
        except torch._dynamo.exc.Unsupported as error:
            torch._dynamo.reset()
            with pytest.raises(type(error), match=re.escape(str(error).splitlines()[0])):
                compiled(hessian(FUNCTIONS[name]))(x)
        else:
            assert_close(compiled(hessian(FUNCTIONS[name]))(x), expected)


@each_function
@each_backend
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_of_compiled_code(transform, backend, function):
    from torch.func import grad, jvp, vmap

    x, v = randn(3, 4), randn(3, 4, seed=1)
    call = {
        "grad": lambda f: grad(f)(x),
        "jvp": lambda f: jvp(f, (x,), (v,)),
        "vmap": lambda f: vmap(f)(torch.stack([x, v])),
    }[transform]
    right_or_raises(lambda: call(compiled(function, backend=backend)), call(function))


@each_function
@each_backend
def test_forward_mode_of_compiled_code(backend, function):
    import torch.autograd.forward_ad as fw

    def tangent(f: Callable[[Tensor], Tensor]) -> Tensor | None:
        with fw.dual_level():
            return fw.unpack_dual(f(fw.make_dual(randn(3, 4), randn(3, 4, seed=1)))).tangent

    right_or_raises(lambda: tangent(compiled(function, backend=backend)), tangent(function))


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_bad_class(dynamic):
    """Compiled code cannot know it: the kernel raises, and the next call works."""
    f = compiled(lambda x, y: cross_entropy(x * 2, y), dynamic=dynamic)
    x = randn(3, 4).requires_grad_()
    f(x, Y).backward()
    for bad, text in ((4, r"got 4 at position \[1\]"), (-1, r"got -1 at position \[1\]")):
        with pytest.raises(IndexError, match=text):
            f(x, torch.tensor([0, bad, 2]))
    assert_close(f(x, Y), cross_entropy(x * 2, Y))


@pytest.mark.devices("cpu", "emulated")  # of torch's own operators a wrong class ends the use of a GPU
def test_bad_class_in_a_compiled_transform():
    """The plain formulas, which stand in there, refuse it too."""
    f = compiled(lambda x, y: torch.func.grad(cross_entropy)(x, y), backend="aot_eager")
    assert_close(f(randn(3, 4), Y), torch.func.grad(cross_entropy)(randn(3, 4), Y))
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        f(randn(3, 4), torch.tensor([0, 4, 2]))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: cross_entropy(x, Y[:2]), r"target must be int64 or uint8 of shape \[3\]"),
        (lambda x: cross_entropy(x, Y.int()), r"Use target\.long\(\)"),
        (lambda x: cross_entropy(x, Y, label_smoothing=2.0), "label_smoothing must lie in"),
        (lambda x: cross_entropy(x, Y, denominator=W), "denominator must have one element"),
        (lambda x: cross_entropy(x, Y, denominator=x.sum()), r"Use denominator\.detach\(\)"),
        (lambda x: cross_entropy(x, Y, row_weight=W), r"have shape \[3\]"),
        (lambda x: cross_entropy(x, Y, row_weight=x[:, 0]), r"Use row_weight\.detach\(\)"),
        (lambda x: cross_entropy(x, Y, row_weight="p"), 'row_weight must be a Tensor, "probability" or None'),
        (lambda x: softmax_ext.softmax(x, 2), r"dim must lie in \[-2, 1\]"),
    ],
    ids=[
        "rows",
        "dtype",
        "option",
        "denominator",
        "denominator with a gradient",
        "row_weight",
        "row_weight with a gradient",
        "row_weight of another text",
        "dim",
    ],
)
def test_misuse_is_found_while_tracing(call, text):
    """The type is Dynamo's; the text must still be there."""
    with pytest.raises(Exception, match=text):
        compiled(call)(randn(3, 4).requires_grad_())


# ---- row_weight ----------------------------------------------------------------------------------------------------

FACTORS = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
WEIGHED: dict[str, Callable[..., Any]] = {
    "given": lambda x, f: cross_entropy(x * 1, Y, row_weight=f, z_loss=0.1),
    "given, with class weights": lambda x, f: cross_entropy(x * 1, Y, W, row_weight=f),
    "given, with class weights and z_loss": lambda x, f: cross_entropy(x * 1, Y, W, row_weight=f, z_loss=0.1),
    "given, with both in a linear layer": lambda x, f: softmax_ext.linear_cross_entropy(
        x, HEAD, Y, weight=W, row_weight=f, z_loss=0.1
    ),
    "given, inplace": lambda x, f: cross_entropy(x * 1, Y, row_weight=f, inplace=True, precompute_grad=True),
    "given, none": lambda x, f: cross_entropy(x * 1, Y, row_weight=f, reduction="none"),
    "given, to a module": lambda x, f: CrossEntropyLoss(W)(x, Y, row_weight=f, denominator=3),
    "given, with statistics": lambda x, f: cross_entropy(x * 1, Y, row_weight=f, return_stats=True, **ALL),
    "computed": lambda x, f: cross_entropy(x * 1, Y, row_weight=x.detach().sum(1) * f),
    "probability": lambda x, f: cross_entropy(x * 1, Y, row_weight="probability"),
    "probability, none": lambda x, f: cross_entropy(x * 1, Y, row_weight="probability", reduction="none"),
    "probability, with statistics": lambda x, f: cross_entropy(
        x * 1, Y, row_weight="probability", return_stats=True, **ALL
    ),
}


@pytest.mark.parametrize("function", WEIGHED.values(), ids=WEIGHED)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_row_weight(backend, function):
    results = []
    for call in (compiled(function, backend=backend), function):
        x = randn(3, 4).requires_grad_()
        found = torch.utils._pytree.tree_leaves(call(x, FACTORS))
        total = sum(t.cos().sum() for t in found if t.requires_grad)
        results.append((*(t.detach() for t in found), *torch.autograd.grad(total, x)))
    assert_close(*results)


def test_row_weight_of_any_number_of_rows():
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(lambda x, y, w: cross_entropy(x, y, row_weight=w), backend=counter, dynamic=True)
    counts = set()
    for rows in (3, 7, 20):
        x, y, w = randn(rows, 4), torch.arange(rows) % 4, randn(rows)
        assert_close(f(x, y, w), cross_entropy(x, y, row_weight=w))
        counts.add(counter.frame_count)
    assert len(counts) == 1, counts


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
@pytest.mark.parametrize("given", [FACTORS, "probability"], ids=["given", "probability"])
def test_row_weight_within_a_compiled_transform(given, transform):
    def function(x: Tensor) -> Tensor:
        return cross_entropy(x, Y, row_weight=given)

    assert_close(compiled(lambda x: transform(function)(x))(randn(3, 4)), transform(function)(randn(3, 4)))


class Weighed(nn.Module):
    def forward(self, x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(x * 1, y, row_weight=w), cross_entropy(x * 1, y, row_weight="probability")


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_row_weight(strict):
    program = torch.export.export(Weighed(), (randn(3, 4), Y, FACTORS), strict=strict)
    assert_close(program.module()(randn(3, 4, seed=7), Y, -FACTORS), Weighed()(randn(3, 4, seed=7), Y, -FACTORS))


# ---- export --------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4, dtype=torch.float64)
        self.loss = CrossEntropyLoss(W, **options)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        logits = self.layer(x)
        return self.loss(logits, y), softmax_ext.softmax(logits, 1)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize(
    "options", [{}, {"return_stats": True, **ALL}, {"inplace": True}], ids=["plain", "all", "inplace"]
)
def test_export(options, strict):
    """With a number of rows that is free; saved, loaded and run."""
    model, rows = Model(**options), torch.export.Dim("rows", min=2)
    shapes = {"x": {0: rows}, "y": {0: rows}}
    program = torch.export.export(model, (randn(3, 5), Y), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for module in (program.module(), loaded.module()):
        for n in (3, 7):
            x, y = randn(n, 5, seed=n), torch.arange(n) % 4
            assert_close(module(x, y), model(x, y))
        with pytest.raises(IndexError, match=r"got 9 at position \[0\]"):
            module(randn(3, 5), torch.full((3,), 9))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]
    assert any(name.startswith("softmax_ext.cross_entropy") for name in names), names
    assert any(name.startswith("softmax_ext.softmax") for name in names), names


class Denominated(nn.Module):
    def forward(self, x: Tensor, y: Tensor, d: Any) -> tuple[Tensor, Tensor]:
        loss = cross_entropy(x * 1, y, denominator=d, precompute_grad=True)
        return loss, softmax_ext.linear_cross_entropy(x, x, y, denominator=d)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("denominator", [3, torch.tensor(3)], ids=["number", "tensor"])
def test_export_with_a_denominator(denominator, strict):
    """A tensor is an argument of the program, a number is a part of it."""
    x, y, model = randn(4, 4), torch.arange(4), Denominated()
    program = torch.export.export(model, (x, y, denominator), strict=strict)
    assert_close(program.module()(x, y, denominator), model(x, y, 3))
    if isinstance(denominator, Tensor):
        assert_close(program.module()(x, y, 2 * denominator), model(x, y, 6))


class DenominatedBySize(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(x, y, reduction="sum", denominator=y.numel() * 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_size_as_denominator(strict):
    """It is that of the call, not of the example."""
    rows = torch.export.Dim("rows", min=2)
    shapes = {"x": {0: rows}, "y": {0: rows}}
    program = torch.export.export(
        DenominatedBySize(), (randn(5, 4), torch.zeros(5, dtype=torch.int64)), dynamic_shapes=shapes, strict=strict
    )
    x, y = randn(8, 4), torch.arange(8) % 4
    assert_close(program.module()(x, y), F.cross_entropy(x, y) / 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("options", [{}, ALL, *STRATEGIES], ids=str)
def test_training_an_exported_program(options, strict):
    """Export is for inference; whoever trains the result gets the gradient of both results all the same."""

    def gradient(module: nn.Module) -> Tensor:
        loss, probabilities = module(randn(3, 5), Y)
        (loss + probabilities[:, 0].sum()).backward()
        (weight,) = (p for name, p in module.named_parameters() if name.endswith("layer.weight"))
        assert weight.grad is not None
        return weight.grad

    program = torch.export.export(Model(**options), (randn(3, 5), Y), strict=strict)
    model = Model(**{k: v for k, v in options.items() if k not in STRATEGIES[-1]})
    model.load_state_dict(program.state_dict)
    assert_close(gradient(program.module()), gradient(model))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_gradient_of_a_program_exported_without_one(strict):
    """Nothing requires grad at the export; logits that do, later, get their gradient."""

    class Loss(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(softmax_ext.log_softmax(x, 1), y)

    program = torch.export.export(Loss(), (randn(3, 4), Y), strict=strict).module()
    gradients = []
    for loss in (program, Loss()):
        x = randn(3, 4).requires_grad_()
        loss(x, Y).backward()
        gradients.append(x.grad)
    assert_close(*gradients)


# ---- the operators -------------------------------------------------------------------------------------------------


def forward_arguments(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int = 1,
    reduction: int = 1,
    stats: bool = False,
    dtype: torch.dtype | None = None,
    softcap: float | None = None,
) -> tuple[Any, ...]:
    options = Options(
        dim, reduction, ignore_index=-100, label_smoothing=0.1, z_loss=0.05, softcap=softcap, logit_scale=0.7
    )
    return (x, target, weight, *options, dtype, stats)


def classes_of(x: Tensor, dim: int = 1, dtype: torch.dtype = torch.int64) -> Tensor:
    batch = [n for d, n in enumerate(x.shape) if d != dim]
    count = torch.Size(batch).numel()
    return (torch.arange(count).view(batch) % max(x.shape[dim], 1)).to(dtype)


IMAGE = randn(2, 3, 4)
INPUTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "classes": lambda: forward_arguments(randn(3, 4), Y),
    "uint8": lambda: forward_arguments(randn(3, 4), Y.to(torch.uint8)),
    "weight": lambda: forward_arguments(randn(3, 40), Y, randn(40).abs(), softcap=3.0),
    "none": lambda: forward_arguments(randn(3, 4), Y, reduction=0),
    "sum": lambda: forward_arguments(randn(3, 4), Y, reduction=2),
    "unbatched": lambda: forward_arguments(randn(4), torch.tensor(2), dim=0, stats=True),
    "image": lambda: forward_arguments(IMAGE, classes_of(IMAGE), stats=True, reduction=0),
    "last dimension": lambda: forward_arguments(IMAGE, classes_of(IMAGE, 2), dim=-1, stats=True, reduction=0),
    "transposed": lambda: forward_arguments(IMAGE.transpose(1, 2), classes_of(IMAGE.transpose(1, 2)), stats=True),
    "sliced": lambda: forward_arguments(randn(3, 9)[:, 1:8:2], Y),
    "probabilities": lambda: forward_arguments(randn(3, 4), randn(3, 4).softmax(1), stats=True),
    "transposed probabilities": lambda: forward_arguments(randn(3, 4), randn(4, 3).softmax(0).T),
    "bfloat16": lambda: forward_arguments(randn(3, 4, dtype=torch.bfloat16), Y, stats=True),
    "bfloat16 to float32": lambda: forward_arguments(randn(3, 4, dtype=torch.bfloat16), Y, dtype=torch.float32),
    "bfloat16 to float64": lambda: forward_arguments(
        randn(3, 4, dtype=torch.bfloat16), Y, dtype=torch.float64, stats=True
    ),
    "float64 probabilities": lambda: forward_arguments(
        randn(3, 4, dtype=torch.half), randn(3, 4).softmax(1), stats=True
    ),
    "no rows": lambda: forward_arguments(randn(0, 4), Y[:0], stats=True, reduction=0),
}
EXPANDED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "expanded rows": lambda: forward_arguments(randn(4).expand(3, 4), Y, stats=True),
    "expanded classes": lambda: forward_arguments(randn(3, 1).expand(3, 4), Y, stats=True),
    "expanded probabilities": lambda: forward_arguments(randn(3, 4), torch.full((), 0.25).expand(3, 4)),
}


def backward_arguments(name: str) -> tuple[Any, ...]:
    """(upstream gradients, input, target, ..., options) of a backward to go with a forward."""
    inputs = {**INPUTS, **EXPANDED}[name]()
    x, target, weight, *options, _, stats = inputs
    loss, state, total, *rest = OPS.cross_entropy(*inputs, False)
    upstream = [torch.rand_like(loss)] + ([torch.rand_like(t) for t in rest[:3]] if stats else [None] * 3)
    entropy = rest[2] if stats else None
    return (*upstream, x, target, weight, state, total, entropy, *options)


SOFTMAX_INPUTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "rows": lambda: (randn(3, 40), 1, False, None),
    "columns": lambda: (randn(3, 4), 0, True, None),
    "negative": lambda: (IMAGE, -2, True, None),
    "transposed": lambda: (IMAGE.permute(2, 0, 1), 1, False, None),
    "sliced": lambda: (randn(3, 9)[:, ::2], 1, False, None),
    "expanded": lambda: (randn(4).expand(3, 4), 1, False, None),
    "dtype": lambda: (randn(3, 4, dtype=torch.bfloat16).T, 1, False, torch.float32),
    "no rows": lambda: (randn(0, 4), 1, False, None),
}


def check_operator(operator: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("precompute_grad", [False, True])
@pytest.mark.parametrize("name", [*INPUTS, *EXPANDED])
def test_opcheck_cross_entropy(name, precompute_grad):
    check_operator(OPS.cross_entropy.default, (*{**INPUTS, **EXPANDED}[name](), precompute_grad))


def requiring_grad(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The logits, and a target of probabilities, as leaves that require grad."""
    x, *rest = arguments
    target = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in rest[:1]]
    return (x.detach().requires_grad_(), *target, *rest[1:])


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("name", [*INPUTS, *EXPANDED])
def test_opcheck_cross_entropy_traced(name, with_grad):
    """It has a derivative, which is checked where an input requires grad."""
    arguments = {**INPUTS, **EXPANDED}[name]()
    check_operator(
        OPS.cross_entropy_traced.default,
        (*(requiring_grad(arguments) if with_grad else arguments), False, None, None, 1),
    )


DENOMINATOR = torch.tensor(3.0, dtype=torch.float64)


@pytest.mark.parametrize("name", ["classes", "none", "image", "probabilities", "bfloat16 to float32"])
def test_opcheck_with_a_denominator(name):
    """With the reduction "none" it divides the gradient that is written, and not the losses."""
    arguments = INPUTS[name]()
    for precompute_grad in (False, True):
        check_operator(OPS.cross_entropy.default, (*arguments, precompute_grad, DENOMINATOR))
        without_data(OPS.cross_entropy.default, (*arguments, precompute_grad, DENOMINATOR))
    check_operator(OPS.cross_entropy_.default, (*arguments, DENOMINATOR))
    traced = (*requiring_grad(arguments), False, DENOMINATOR, None, 1)
    check_operator(OPS.cross_entropy_traced.default, traced)
    plain, divided = OPS.cross_entropy(*arguments, True), OPS.cross_entropy(*arguments, True, DENOMINATOR)
    total = plain[2] if plain[2].dim() == 0 else 1.0
    assert_close(
        divided[-1].double() * 3, plain[-1].double() * total, rtol=1e-6 if name[:2] != "bf" else 1e-2, atol=1e-6
    )
    assert divided[2] == 3


@pytest.mark.parametrize("name", ["classes", "none", "image", "probabilities", "bfloat16 to float32", "no rows"])
def test_opcheck_with_row_weight(name):
    arguments = INPUTS[name]()
    x, target, weight, *options = arguments
    batch = [n for d, n in enumerate(x.shape) if d != 1]
    kinds: list[tuple[tuple[Any, ...], Tensor | None]] = [(arguments, torch.rand(batch))]
    if not target.is_floating_point():
        by_probability = Options(*options[:-2])._replace(weighs_by_probability=True)
        kinds.append(((x, target, weight, *by_probability, *options[-2:]), None))
    for call, factors in kinds:
        for precompute_grad in (False, True):
            check_operator(OPS.cross_entropy.default, (*call, precompute_grad, None, factors))
            without_data(OPS.cross_entropy.default, (*call, precompute_grad, None, factors))
        check_operator(OPS.cross_entropy_.default, (*call, None, factors))
        check_operator(OPS.cross_entropy_traced.default, (*requiring_grad(call), False, None, factors, 1))
        x, target, weight, *options, _, stats = call
        loss, state, total, *rest = OPS.cross_entropy(*call, False, None, factors)
        upstream = [torch.rand_like(loss)] + ([torch.rand_like(t) for t in rest[:3]] if stats else [None] * 3)
        backward = (*upstream, x, target, weight, state, total, rest[2] if stats else None, *options)
        further = (0, None, factors)
        check_operator(OPS.cross_entropy_backward.default, (*backward, True, target.is_floating_point(), *further))
        check_operator(OPS.cross_entropy_backward_.default, (*backward, *further))


@pytest.mark.parametrize(
    ("reduction", "denominator", "text"),
    [
        (1, DENOMINATOR.float(), "denominator must be a float64 scalar"),
        (1, DENOMINATOR.view(1), "denominator must be a float64 scalar"),
        (2, DENOMINATOR, "a sum has no denominator"),
    ],
)
def test_operators_refuse_another_denominator(reduction, denominator, text):
    arguments = forward_arguments(randn(3, 4), Y, reduction=reduction)
    with pytest.raises(RuntimeError, match=text):
        OPS.cross_entropy(*arguments, False, denominator)
    with pytest.raises(RuntimeError, match=text):
        OPS.cross_entropy_(*arguments, denominator)


@pytest.mark.parametrize("name", ["classes", "weight", "image", "transposed", "probabilities", "bfloat16 to float32"])
def test_opcheck_cross_entropy_inplace(name):
    check_operator(OPS.cross_entropy_.default, INPUTS[name]())


@pytest.mark.parametrize("name", [*INPUTS, *EXPANDED])
def test_opcheck_cross_entropy_backward(name):
    probabilities = {**INPUTS, **EXPANDED}[name]()[1].is_floating_point()
    for needs in [(True, False), *([(False, True), (True, True)] if probabilities else [])]:
        check_operator(OPS.cross_entropy_backward.default, (*backward_arguments(name), *needs))


@pytest.mark.parametrize("name", INPUTS)
def test_opcheck_cross_entropy_backward_inplace(name):
    check_operator(OPS.cross_entropy_backward_.default, backward_arguments(name))


@pytest.mark.parametrize("name", [*INPUTS, "by probability"])
def test_opcheck_parts(name):
    """A part of the classes alone and behind another, and the results of both."""
    x, target, weight, *options, dtype, stats = INPUTS["classes" if name == "by probability" else name]()
    options = Options(*options)._replace(dim=options[0] % x.dim())
    if name == "by probability":
        options = options._replace(weighs_by_probability=True)
    classes, dim = x.shape[options.dim], options.dim
    wide = torch.float64 in (x.dtype, dtype, target.dtype)
    parts, part = [], None
    for begin, end in ((0, classes // 2), (classes // 2, classes)):
        indices = target.narrow(dim, begin, end - begin) if target.is_floating_point() else target
        logits = x.narrow(dim, begin, end - begin)
        arguments = (logits, indices, weight, *options, dtype, stats, begin, classes)
        check_operator(OPS.cross_entropy_part.default, arguments)
        parts.append(OPS.cross_entropy_part(*arguments))
        if part is not None:
            check_operator(OPS.cross_entropy_part.default, (*arguments, part))
        part = OPS.cross_entropy_part(*arguments, part)
    indices = None if target.is_floating_point() else target
    arguments = (indices, weight, *options, dtype or x.dtype, wide, stats, None, classes)
    for stack in (torch.stack(parts), part.unsqueeze(0)):
        check_operator(OPS.cross_entropy_of_parts.default, (stack, *arguments))
        found = OPS.cross_entropy_of_parts(stack, *arguments)
        expected = OPS.cross_entropy(x, target, weight, *options, dtype, stats, False)
        assert [t.shape for t in found] == [t.shape for t in expected]
        assert_close(found[0], expected[0], rtol=1e-5 if found[0].dtype != torch.bfloat16 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("name", SOFTMAX_INPUTS)
def test_opcheck_softmax(name):
    x, dim, log, dtype = SOFTMAX_INPUTS[name]()
    check_operator(OPS.softmax.default, (x, dim, log, dtype))
    y = OPS.softmax(x, dim, log, dtype)
    check_operator(OPS.softmax_backward.default, (torch.rand_like(y), y, dim, log, x.dtype))


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("name", SOFTMAX_INPUTS)
def test_opcheck_softmax_traced(name, with_grad):
    arguments = SOFTMAX_INPUTS[name]()
    check_operator(OPS.softmax_traced.default, (*(requiring_grad(arguments) if with_grad else arguments), 1))


@pytest.mark.parametrize("log", [False, True])
def test_opcheck_operators_of_a_compiled_backward(log):
    """Which refuse to run where their result is to be differentiated, and so where grad mode is on."""
    y = OPS.softmax(randn(3, 4), 1, log, None)
    with torch.no_grad():
        check_operator(OPS.softmax_backward_traced.default, (torch.rand_like(y), y, 1, log, y.dtype))
        check_operator(OPS.refusing.default, (torch.tensor(2.0).double(), randn(3), "cross_entropy"))


def test_opcheck_of_what_stands_behind_torchs_operations():
    check_operator(OPS.refusing_backward.default, (randn(3).requires_grad_(), "cross_entropy"))


def test_opcheck_scale_rows():
    for factor in (torch.tensor(2.0), torch.tensor(1.0).double(), randn(3), randn(3, dtype=torch.float32)):
        for tensor in (randn(3, 4), randn(4, 3).T, randn(3, 40, dtype=torch.bfloat16)):
            check_operator(OPS.scale_rows_.default, (tensor, factor, 1))


WITH_OPTIONS = [
    "cross_entropy",
    "cross_entropy_",
    "cross_entropy_backward",
    "cross_entropy_backward_",
    "cross_entropy_of_parts",
    "cross_entropy_part",
    "cross_entropy_traced",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
]


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_the_options_have_one_order(name):
    """They are given by position: Python's, those of the schema in C++ and of the schemas in Python are the same."""
    names = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    first = names.index("dim")
    assert names[first : first + len(Options._fields)] == list(Options._fields)


def test_every_operator_is_checked():
    """A new operator needs an opcheck here."""
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "softmax_ext::" in name
    }
    assert names == {
        "cross_entropy",
        "cross_entropy_",
        "cross_entropy_backward",
        "cross_entropy_backward_",
        "cross_entropy_of_parts",
        "cross_entropy_part",
        "cross_entropy_traced",
        "linear_cross_entropy",  # test_linear.py
        "linear_cross_entropy_backward",
        "refusing",
        "refusing_backward",
        "softmax",
        "softmax_backward",
        "softmax_backward_traced",
        "softmax_traced",
        "scale_rows_",
    }


def described(results: Any) -> list[tuple[Any, ...]]:
    leaves = [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, Tensor)]
    return [(t.dtype, tuple(t.shape), tuple(t.stride())) for t in leaves]


def to_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def without_data(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Dtypes, shapes and strides are the same with data, on meta, and as fake tensors."""
    expected = described(operator(*arguments))
    on_meta = operator(*map(to_meta, arguments))
    assert all(t.is_meta for t in torch.utils._pytree.tree_leaves(on_meta))
    assert described(on_meta) == expected
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        results = operator(*fakes)
    assert all(t.device == Y.device for t in torch.utils._pytree.tree_leaves(results))
    assert described(results) == expected


@pytest.mark.parametrize("name", [*INPUTS, *EXPANDED])
def test_cross_entropy_without_data(name):
    arguments = {**INPUTS, **EXPANDED}[name]()
    for precompute_grad in (False, True):
        without_data(OPS.cross_entropy.default, (*arguments, precompute_grad))
    without_data(
        OPS.cross_entropy_backward.default, (*backward_arguments(name), True, arguments[1].is_floating_point())
    )


@pytest.mark.parametrize("name", SOFTMAX_INPUTS)
def test_softmax_without_data(name):
    x, dim, log, dtype = SOFTMAX_INPUTS[name]()
    without_data(OPS.softmax.default, (x, dim, log, dtype))
    y = OPS.softmax(x, dim, log, dtype)
    without_data(OPS.softmax_backward.default, (torch.rand_like(y), y, dim, log, x.dtype))


@pytest.mark.parametrize("strategy", [{}, {"precompute_grad": True}, {"inplace": True}, STRATEGIES[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_functions_on_meta(strategy, dtype):
    """A model can be tried out without memory, its backward too."""
    leaf = torch.empty(3, 4, 5, device="meta", dtype=dtype, requires_grad=True)
    target = torch.empty(3, 5, dtype=torch.int64, device="meta")
    loss, stats = cross_entropy(leaf * 2, target, return_stats=True, **strategy)
    assert loss.shape == ()
    assert [t.shape for t in stats] == [(3, 5)] * 4
    loss.backward()
    assert leaf.grad.is_meta
    assert leaf.grad.shape == leaf.shape
    y = softmax_ext.log_softmax(leaf, 1)
    assert y.is_meta
    y.sum().backward()


def test_torch_function_modes_and_device_contexts():
    with torch.device("meta"):
        loss = cross_entropy(torch.empty(3, 4), torch.empty(3, dtype=torch.int64))
    assert loss.is_meta
    assert loss.dtype == torch.float32


# ---- sizes without a value: the rows that a boolean mask picks -----------------------------------------------------

HIDDEN, WEIGHT, LABELS = randn(6, 8), randn(11, 8, seed=1), torch.tensor([1, -100, 3, 4, -100, 2])
SHARES, PICKED_FACTORS = randn(6, 11, seed=2).softmax(1), randn(6, seed=3).square()
PICKED: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, w, x_mask, mask: softmax_ext.linear_cross_entropy(x[x_mask], w, LABELS[mask]),
    "linear, stats": lambda x, w, x_mask, mask: softmax_ext.linear_cross_entropy(
        x[x_mask], w, LABELS[mask], return_stats=True
    )[0],
    "linear, none": lambda x, w, x_mask, mask: softmax_ext.linear_cross_entropy(
        x[x_mask], w, LABELS[mask], reduction="none"
    ).sum(),
    "linear, 3 dimensions": lambda x, w, x_mask, mask: softmax_ext.linear_cross_entropy(
        x[x_mask][None], w, LABELS[mask][None]
    ),
    "linear, row_weight": lambda x, w, x_mask, mask: softmax_ext.linear_cross_entropy(
        x[x_mask], w, LABELS[mask], row_weight=PICKED_FACTORS[mask]
    ),
    "linear, probabilities": lambda x, w, x_mask, mask: softmax_ext.linear_cross_entropy(x[x_mask], w, SHARES[mask]),
    "linear, float16": lambda x, w, x_mask, mask: softmax_ext.linear_cross_entropy(
        x[x_mask].half(), w.half(), LABELS[mask], weight=SHARES[0], row_weight=PICKED_FACTORS[mask]
    ),
    "logits": lambda x, w, x_mask, mask: cross_entropy((x @ w.T)[x_mask], LABELS[mask]),
    "logits, row_weight": lambda x, w, x_mask, mask: cross_entropy(
        (x @ w.T)[x_mask], LABELS[mask], row_weight=PICKED_FACTORS[mask]
    ),
    "logits, probabilities": lambda x, w, x_mask, mask: cross_entropy((x @ w.T)[x_mask], SHARES[mask]),
    "logits, weight": lambda x, w, x_mask, mask: cross_entropy((x @ w.T)[x_mask], LABELS[mask], SHARES[0].detach()),
    "logits, 3 dimensions": lambda x, w, x_mask, mask: cross_entropy(
        (x @ w.T)[x_mask][..., None], LABELS[mask][:, None]
    ),
    "softmax": lambda x, w, x_mask, mask: softmax_ext.softmax((x @ w.T)[x_mask], 1).square().sum(),
}


# A mask is traced, instead of a break of the graph.
masks = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)


@masks
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in PICKED), ("linear", "inductor"), ("logits", "inductor")]
)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_rows_of_a_boolean_mask(name, needs_grad, backend):
    """inductor itself fails where the same mask is computed twice, with torch's own cross entropy too."""

    def loss(x: Tensor, w: Tensor) -> Tensor:
        mask = LABELS != -100
        return PICKED[name](x, w, mask if backend == "inductor" else LABELS != -100, mask)

    operands = [t.clone().requires_grad_(needs_grad) for t in (HIDDEN, WEIGHT)]
    ours, right = torch.compile(loss, fullgraph=True, backend=backend)(*operands), loss(*operands)
    assert_close(ours, right)
    if needs_grad:
        for grad, expected in zip(*(torch.autograd.grad(found, operands) for found in (ours, right)), strict=True):
            assert_close(grad, expected)


@masks
def test_masks_that_pick_different_numbers_of_rows():
    def loss(x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        return cross_entropy(x[mask], LABELS[other])

    function = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mask = LABELS != -100
    assert_close(function(HIDDEN, mask, mask), loss(HIDDEN, mask, mask))
    with pytest.raises(RuntimeError, match="Eq"):
        function(HIDDEN, mask, LABELS == 3)


@masks
def test_rows_of_a_boolean_mask_under_patch():
    def loss(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.T)[LABELS != -100], LABELS[LABELS != -100])

    right = loss(HIDDEN, WEIGHT)
    with softmax_ext.patch():
        assert_close(compiled(loss)(HIDDEN, WEIGHT), right)
