"""softmax_ext.patch(): what it replaces, which calls go where, and that what it replaced comes back.

Scripts of a user run unchanged, and what they compute is torch's within rounding.
"""

import copy
import inspect
import math
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import python
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import softmax_ext

pytestmark = [
    pytest.mark.devices("cpu"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
]

NAMES = [(F, "cross_entropy"), (F, "softmax"), (F, "log_softmax")] + [
    (owner, name) for owner in (torch, Tensor) for name in ("softmax", "log_softmax")
]
OWN = [getattr(owner, name) for owner, name in NAMES]
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 3, 1, 2, 0, 3])
Q = torch.rand(6, 4, generator=torch.Generator().manual_seed(2)).softmax(1)
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.5])


def found() -> list[Any]:
    return [getattr(owner, name) for owner, name in NAMES]


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    softmax_ext.unpatch()
    assert found() == OWN
    assert not {"softmax", "log_softmax"} & vars(Tensor).keys()


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def is_ours(call: Callable[[], Any]) -> bool:
    with Operators() as mode:
        call()
    ours = any(name.startswith("softmax_ext.") for name in mode.names)
    assert ours != any("softmax" in name and name.startswith("aten.") for name in mode.names)
    return ours


# ---- in place, and back ----


def test_patch_and_unpatch():
    for _ in range(2):
        softmax_ext.patch()
        softmax_ext.patch()
        assert all(new is not own for new, own in zip(found(), OWN, strict=True))
        assert is_ours(lambda: F.cross_entropy(X, Y))
        softmax_ext.unpatch()
        assert found() == OWN
        assert not is_ours(lambda: F.cross_entropy(X, Y))
    softmax_ext.unpatch()


def test_nested():
    with softmax_ext.patch() as outer:
        patched = found()
        inner = softmax_ext.patch()
        with softmax_ext.patch():
            assert found() == patched
        with inner:
            assert found() == patched
        assert found() == patched
        outer.__exit__(None, None, None)
        assert found() == OWN
        with outer:
            assert is_ours(lambda: torch.softmax(X, 1))
    assert found() == OWN


def test_left_by_an_exception():
    with pytest.raises(ZeroDivisionError), softmax_ext.patch():
        raise ZeroDivisionError
    assert found() == OWN


def test_a_name_that_was_imported_meanwhile():
    with softmax_ext.patch():
        kept = found()
    for function, own in zip(kept, OWN, strict=True):
        arguments = (X, Y) if own.__name__ == "cross_entropy" else (X, 1)
        assert torch.equal(function(*arguments), own(*arguments))
        assert not is_ours(lambda function=function, arguments=arguments: function(*arguments))
    with softmax_ext.patch():
        assert not is_ours(lambda: kept[0](X, Y)), "each patch has its own replacements"


def test_somebody_else_replaces_a_function():
    patched = softmax_ext.patch()
    replacement = F.softmax

    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return replacement(*args, **kwargs)

    F.softmax = wrapper
    try:
        with pytest.warns(
            UserWarning, match=r"replaced torch.nn.functional.softmax since .* it is left alone"
        ) as caught:
            softmax_ext.unpatch()
        assert caught[0].filename == __file__
        assert F.softmax is wrapper
        assert torch.equal(F.softmax(X, 1), OWN[1](X, 1))
        with softmax_ext.patch(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert is_ours(lambda: F.softmax(X, 1))
            assert torch.equal(F.softmax(X.long(), 1, dtype=torch.float32), OWN[1](X.long(), 1, dtype=torch.float32))
        assert F.softmax is wrapper, "what was there before patch()"
    finally:
        F.softmax = OWN[1]
    assert patched.report is None


def test_they_look_like_torchs():
    with softmax_ext.patch():
        for (owner, name), own in zip(NAMES, OWN, strict=True):
            new = getattr(owner, name)
            assert (new.__name__, new.__doc__) == (own.__name__, own.__doc__)
            if owner is F:
                assert (new.__qualname__, new.__module__) == (own.__qualname__, own.__module__)
                assert inspect.signature(new) == inspect.signature(own)


# ---- which calls go where ----

P = nn.Parameter(X.clone())


class Plain(Tensor):
    pass


OURS = {
    "functions": lambda: F.softmax(X, 1) + F.log_softmax(X, 1),
    "_stacklevel": lambda: F.softmax(X, 1, 3, torch.float64),
    "torch": lambda: torch.softmax(input=X, dim=1, dtype=torch.float64) + torch.log_softmax(X, -1, torch.float64),
    "methods": lambda: X.softmax(dim=0) + X.log_softmax(1),
    "parameter": lambda: P.softmax(1),
    "no dimensions": lambda: torch.tensor(2.0).softmax(0),
    "empty": lambda: torch.empty(0, 4).softmax(1),
    "bfloat16": lambda: X.bfloat16().softmax(1),
    "float16": lambda: X.half().softmax(1, dtype=torch.float32),
    "autocast": lambda: under_autocast(lambda: X.bfloat16().softmax(1)),
    "view": lambda: X.t().softmax(0),
    "negated view": lambda: torch._neg_view(X).softmax(1),
    "classes": lambda: F.cross_entropy(X, Y),
    "uint8": lambda: F.cross_entropy(X, Y.byte()),
    "probabilities": lambda: F.cross_entropy(X, Q),
    "probabilities in float64": lambda: F.cross_entropy(X, Q.double(), WEIGHT),
    "all positional": lambda: F.cross_entropy(X, Y, WEIGHT, None, 2, None, "none", 0.1),
    "none": lambda: F.cross_entropy(X, Y, reduction="none", label_smoothing=1),
    "one sample": lambda: F.cross_entropy(X[0], Y[0]),
    "more dimensions": lambda: F.cross_entropy(torch.stack([X, X + 1], 2), torch.stack([Y, Y], 1), reduction="sum"),
    "module": lambda: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)(X, Y),
    "softmax module": lambda: nn.Softmax(1)(X) + nn.LogSoftmax(1)(X) + nn.Softmax2d()(X.view(6, 1, 2, 2)).view(6, 4),
    "gumbel": lambda: F.gumbel_softmax(X, 1.0),
    "softmax of an attention": lambda: attention()(X, X, X)[0],
    "default device": lambda: under_default_device(lambda: F.cross_entropy(X, Y) + X.softmax(1).sum()),
    "autocast loss": lambda: under_autocast(lambda: F.cross_entropy(X.bfloat16(), Y)),
}


def under_autocast(call: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu"):
        return call()


def under_default_device(call: Callable[[], Tensor]) -> Tensor:
    with torch.device("cpu"):
        return call()


def attention() -> nn.Module:
    torch.manual_seed(3)
    return nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize("name", OURS)
def test_goes_to_softmax_ext(name):
    torch.manual_seed(4)
    expected = OURS[name]()
    with softmax_ext.patch(report=True) as patched:
        torch.manual_seed(4)
        result = OURS[name]()
        assert is_ours(OURS[name])
    assert result.dtype == expected.dtype
    assert_close(result, expected)
    assert patched.report.softmax_ext.total() > 0
    assert not patched.report.torch


LOGITS = X.clone().requires_grad_()
TORCHS = {
    "subclass": (lambda: F.cross_entropy(X.as_subclass(Plain), Y), "input: Plain"),
    "subclass in softmax": (lambda: X.as_subclass(Plain).softmax(1), "input: Plain"),
    "integers": (lambda: X.long().softmax(1, dtype=torch.float32), "input: int64"),
    "integers, function": (lambda: F.log_softmax(X.long(), 1, dtype=torch.float32), "input: int64"),
    "sparse": (lambda: torch.sparse.softmax(X.to_sparse(), 1).to_dense(), None),
    "nested": (
        lambda: torch.nested.nested_tensor([X, X], layout=torch.jagged).softmax(-1).values(),
        "input: NestedTensor",
    ),
    "axis": (lambda: torch.softmax(X, axis=1), "other arguments than input, dim and dtype"),
    "out": (lambda: torch.softmax(X, 1, out=torch.empty(6, 4)), "other arguments than input, dim and dtype"),
    "dim as a tensor": (lambda: X.softmax(torch.tensor(1)), "dim: no int, or out of range"),
    "negative smoothing": (
        lambda: F.cross_entropy(X, Y, label_smoothing=-0.5),
        "label_smoothing: no number from 0 to 1",
    ),
    "smoothing as a tensor": (
        lambda: F.cross_entropy(X, Y, label_smoothing=torch.tensor(0.5)),
        "label_smoothing: no number from 0 to 1",
    ),
    "ignore_index as a tensor": (
        lambda: F.cross_entropy(X, Y, ignore_index=torch.tensor(3)),
        "ignore_index: no int of 64 bits",
    ),
    "int weight": (lambda: F.cross_entropy(X, Q, WEIGHT.long()), "weight: int64"),
    "mode": (lambda: under_mode(lambda: F.cross_entropy(X, Y)), "a TorchFunctionMode"),
    "mode in softmax": (lambda: under_mode(lambda: X.softmax(1)), "a TorchFunctionMode"),
    "jit.trace": (lambda: jit_traced(), "torch.jit.trace"),
}


class Through(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func in OWN, "what it is given is torch's own"
        return func(*args, **(kwargs or {}))


def under_mode(call: Callable[[], Tensor]) -> Tensor:
    with Through():
        return call()


def jit_traced() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(lambda x: F.cross_entropy(x, Y), X, check_trace=False)(X)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", TORCHS)
def test_goes_to_torch(name):
    """And gets the same bits, in the same class, from one call that is counted."""
    call, reason = TORCHS[name]
    expected = call()
    with softmax_ext.patch(report=True) as patched:
        result = call()
        assert name in ("jit.trace", "nested", "sparse") or not is_ours(call)
    assert type(result) is type(expected)
    assert torch.equal(result, expected)
    assert not patched.report.softmax_ext
    if reason is not None:
        assert [list(reasons) for reasons in patched.report.torch.values()] == [[reason]]


@pytest.mark.skipif(not hasattr(Tensor, "names"), reason="this torch has no named tensors")
@pytest.mark.filterwarnings("ignore:Named tensors")
def test_named_dimensions():
    x = X.refine_names("N", "C")
    with softmax_ext.patch():
        assert x.softmax("C").names == x.softmax(1).names == ("N", "C")


def test_torch_function_is_given_torchs_own():
    seen = []

    class Seeing(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    with softmax_ext.patch():
        for (owner, name), own in zip(NAMES, OWN, strict=True):
            seen.clear()
            getattr(owner, name)(X.as_subclass(Seeing), Y if name == "cross_entropy" else 1)
            assert seen[0] == own


def test_class_weights_that_require_grad():
    """They get torch's gradient with probabilities, and torch's refusal with class indices."""
    weight = WEIGHT.clone().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(X, Q, weight), weight)
    with softmax_ext.patch(report=True) as patched:
        assert_close(torch.autograd.grad(F.cross_entropy(X, Q, weight), weight), expected)
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
            F.cross_entropy(X, Y, weight)
        with torch.no_grad():
            F.cross_entropy(X, Y, weight)
    assert patched.report.softmax_ext.total() == 2
    assert patched.report.torch["torch.nn.functional.cross_entropy"].total() == 1


BAD = {
    "class out of range": lambda: F.cross_entropy(X, Y + 1),
    "int32": lambda: F.cross_entropy(X, Y.int()),
    "shape": lambda: F.cross_entropy(X, Y[:5]),
    "shape of weights": lambda: F.cross_entropy(X, Y, WEIGHT[:3]),
    "reduction": lambda: F.cross_entropy(X, Y, reduction="max"),
    "smoothing": lambda: F.cross_entropy(X, Y, label_smoothing=1.5),
    "one-hot integers": lambda: F.cross_entropy(X, F.one_hot(Y, 4)),
    "ignore_index with probabilities": lambda: F.cross_entropy(X, Q, ignore_index=1),
    "no dimensions": lambda: F.cross_entropy(torch.tensor(1.0), torch.tensor(0)),
    "dim": lambda: F.softmax(X, 2),
    "dim of a method": lambda: X.softmax(-3),
    "integers": lambda: X.long().softmax(1),
    "complex": lambda: X.to(torch.complex64).softmax(1),
    "dtype": lambda: X.softmax(1, dtype=torch.complex64),
    "no argument": lambda: torch.softmax(),
    "twice": lambda: torch.softmax(X, 1, dim=1),
    "unknown name": lambda: X.softmax(1, foo=3),
    "no tensor": lambda: F.cross_entropy([1.0], Y),
    "no target": lambda: F.cross_entropy(X, None),
}


@pytest.mark.parametrize("name", BAD)
def test_what_torch_refuses_is_refused(name):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        BAD[name]()
    with softmax_ext.patch(), pytest.raises(theirs.type):
        BAD[name]()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "elementwise_mean"])
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.filterwarnings("ignore")
def test_deprecated_arguments(reduction, size_average, reduce):
    call = lambda: F.cross_entropy(X, Y, WEIGHT, size_average, 3, reduce, reduction)  # noqa: E731
    module = lambda: nn.CrossEntropyLoss(WEIGHT, size_average, 3, reduce, reduction)(X, Y)  # noqa: E731
    expected = call()
    with softmax_ext.patch():
        assert is_ours(call)
        assert_close(call(), expected)
        assert_close(module(), expected)


def test_dim_left_out_warns_at_the_call():
    x = torch.randn(2, 3, 4)
    for call in (lambda: F.softmax(x), lambda: F.log_softmax(x.long(), dtype=torch.float64)):
        expected = pytest.warns(UserWarning, match="Implicit dimension choice")
        with expected as theirs:
            own = call()
        for context in (softmax_ext.patch(), softmax_ext.patch(report=True)):
            with context, pytest.warns(UserWarning, match="Implicit dimension choice") as ours:
                assert_close(call(), own)
            assert [(w.filename, w.lineno) for w in ours] == [(w.filename, w.lineno) for w in theirs]
            assert ours[0].filename == __file__
        softmax_ext.unpatch()


# ---- the report ----


def test_report():
    with softmax_ext.patch(report=True) as patched:
        assert str(patched.report) == "no calls"
        for _ in range(3):
            F.cross_entropy(X, Y)
        F.softmax(X, 1)
        F.softmax(X.long(), 1, dtype=torch.float64)
        X.as_subclass(Plain).log_softmax(1)
        with softmax_ext.patch(report=True) as inner:
            F.cross_entropy(X, Y)
        F.cross_entropy(X, Y)
    F.cross_entropy(X, Y)
    assert inner.report.softmax_ext == {"torch.nn.functional.cross_entropy": 1}
    assert patched.report.softmax_ext == {"torch.nn.functional.cross_entropy": 5, "torch.nn.functional.softmax": 1}
    assert patched.report.torch == {
        "torch.nn.functional.softmax": {"input: int64": 1},
        "torch.Tensor.log_softmax": {"input: Plain": 1},
    }
    assert str(patched.report).splitlines() == [
        "torch.Tensor.log_softmax: 0 to softmax_ext, 1 to torch",
        "    1 for input: Plain",
        "torch.nn.functional.cross_entropy: 5 to softmax_ext, 0 to torch",
        "torch.nn.functional.softmax: 1 to softmax_ext, 1 to torch",
        "    1 for input: int64",
    ]


# ---- derivatives and transforms ----


def test_derivatives():
    """All of autograd, through the names of torch: the formulas inside do not come back to the replacements."""
    x = X.double()
    functions = {
        "cross_entropy": lambda t: F.cross_entropy(t, Y, label_smoothing=0.1),
        "softmax": lambda t: (F.softmax(t, 1) ** 2).sum(),
        "log_softmax": lambda t: (t.log_softmax(0) ** 2).sum(),
    }
    for name, function in functions.items():
        expected = [torch.func.hessian(function)(x), torch.func.grad(function)(x)]
        batch = torch.stack([x, x + 1, x * 2])
        expected.append(torch.func.vmap(torch.func.grad(function))(batch))
        with softmax_ext.patch(report=True) as patched:
            results = [torch.func.hessian(function)(x), torch.func.grad(function)(x)]
            results.append(torch.func.vmap(torch.func.grad(function))(batch))
            assert torch.autograd.gradcheck(function, x.clone().requires_grad_())
            assert torch.autograd.gradgradcheck(function, x.clone().requires_grad_())
        assert_close(results, expected, msg=name)
        assert not patched.report.torch
        assert list(patched.report.softmax_ext) == [next(iter(patched.report.softmax_ext))], (
            "no function of another name"
        )


# ---- users' scripts ----


def losses(train: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor], Any]:
    """What a script returns without and with a patch."""
    torch.manual_seed(0)
    theirs = train()
    with softmax_ext.patch(report=True) as patched:
        torch.manual_seed(0)
        ours = train()
    return ours, theirs, patched.report


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.convolutions(x))


def train_resnet() -> list[Tensor]:
    """As torchvision's references do: a criterion, SGD, and the accuracy."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    found = []
    for _ in range(3):
        image, target = torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found += [loss.detach(), output.softmax(dim=1).topk(5, 1, True, True).values.detach()]
    return found


def train_mixup() -> list[Tensor]:
    """As timm does: soft targets of mixup, and its losses."""
    model = nn.Linear(16, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found = []
    for _ in range(3):
        x, y = torch.randn(8, 16), torch.randint(0, 10, (8,))
        lam = 0.3
        target = F.one_hot(y, 10) * lam + F.one_hot(y.flip(0), 10) * (1 - lam)
        x = x * lam + x.flip(0) * (1 - lam)
        soft = torch.sum(-target * F.log_softmax(model(x), dim=-1), dim=-1).mean()
        logprobs = F.log_softmax(model(x), dim=-1)
        smoothed = 0.9 * -logprobs.gather(dim=-1, index=y.unsqueeze(1)).squeeze(1) + 0.1 * -logprobs.mean(dim=-1)
        loss = soft + smoothed.mean() + F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        hidden = torch.ones(x.shape[1], x.shape[1]).tril() == 0
        scores = F.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        return self.out((scores @ v).transpose(1, 2).flatten(-2))


def train_gpt() -> list[Tensor]:
    """As nanoGPT does: the loss of flattened logits with ignored positions, gradient clipping, sampling."""
    embedding, head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
    head.weight = embedding.weight
    blocks = nn.Sequential(nn.LayerNorm(16), Attention(16), nn.LayerNorm(16))
    parameters = [*embedding.parameters(), *blocks.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    found = []
    for _ in range(3):
        tokens = torch.randint(0, 20, (4, 9))
        targets = tokens[:, 1:].clone()
        targets[0, :3] = -1
        for _ in range(2):
            logits = head(embedding(tokens[:, :-1]) + blocks(embedding(tokens[:, :-1])))
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1) / 2
            loss.backward()
        found += [loss.detach(), nn.utils.clip_grad_norm_(parameters, 1.0).detach()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    probabilities = F.softmax(logits[:, -1, :] / 0.8, dim=-1)
    return [*found, probabilities.detach(), torch.multinomial(probabilities, 1)]


def run_modules() -> list[Tensor]:
    """torch's modules that use softmax inside."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    attention = nn.MultiheadAttention(8, 2)
    adaptive = nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10])
    x = torch.randn(3, 5, 8)
    y = torch.randint(0, 20, (3,))
    results = [
        layer(x),
        attention(x, x, x)[0],
        adaptive(x[:, 0], y).loss,
        adaptive.log_prob(x[:, 0]),
        adaptive.predict(x[:, 0]),
    ]
    layer.eval()
    results += [layer(x), nn.Softmax2d()(x), nn.Softmin(1)(x), torch.distributions.Categorical(logits=x).probs]
    for weight in (None, torch.rand(8)):
        for reduction in ("none", "mean", "sum"):
            for target in (torch.tensor([1, 7, 0]), torch.rand(3, 8)):
                loss = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=0.2)
                results.append(loss(x[:, 0], target))
    return [t.detach() for t in results]


SCRIPTS = {
    "torchvision": (train_resnet, "cross_entropy"),
    "timm": (train_mixup, "log_softmax"),
    "nanoGPT": (train_gpt, "cross_entropy"),
    "modules": (run_modules, "softmax"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name):
    script, function = SCRIPTS[name]
    ours, theirs, report = losses(script)
    assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    assert report.softmax_ext[f"torch.nn.functional.{function}"] > 0
    assert not report.torch, str(report)


def test_copies_of_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(1))
    with softmax_ext.patch():
        again = copy.deepcopy(model)
        assert_close(again(X), model(X))


# ---- TorchScript ----


def scripted_step(x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(x, y) + torch.softmax(x, 1).sum() + x.log_softmax(1).sum()
    return loss + F.log_softmax(x, dim=0).sum() + torch.log_softmax(x, 1).mean()


def test_jit_script():
    """What is scripted under a patch is torch's own."""
    expected = scripted_step(X, Y)
    with softmax_ext.patch():
        step = torch.jit.script(scripted_step)
        module = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)))
        loss = torch.jit.script(nn.CrossEntropyLoss())
        assert torch.equal(step(X, Y), expected)
        assert module(X).shape == X.shape
    assert torch.equal(step(X, Y), expected)
    assert torch.equal(loss(X, Y), F.cross_entropy(X, Y))


def test_export():
    """An exported program does not need this package."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.cross_entropy(x, Y) + torch.softmax(x, 1).sum() + x.log_softmax(1).sum()

    with softmax_ext.patch():
        for strict in (False, True):
            program = torch.export.export(Model(), (X,), strict=strict)
            assert "softmax_ext" not in program.graph_module.code
            assert_close(program.module()(X), Model()(X))


# ---- torch.compile, in a process of its own for each case: Dynamo lists torch's functions once ----

COMPILE = """
import sys, warnings
import torch, torch.nn.functional as F
from torch import nn
import softmax_ext

warnings.simplefilter("ignore")
x, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
criterion, module = nn.CrossEntropyLoss(label_smoothing=0.1), nn.Softmax(1)
calls = {
    "F.cross_entropy": lambda x: F.cross_entropy(x, y),
    "F.softmax": lambda x: F.softmax(x, -1),
    "torch.log_softmax": lambda x: torch.log_softmax(x, 1),
    "Tensor.softmax": lambda x: x.softmax(1),
    "CrossEntropyLoss": lambda x: criterion(x, y),
    "Softmax": lambda x: module(x),
    "size_average": lambda x: F.cross_entropy(x, y, size_average=False),
    "elementwise_mean": lambda x: F.cross_entropy(x, y, reduction="elementwise_mean"),
    "no dim": lambda x: F.softmax(x),
    "axis": lambda x: torch.softmax(x, axis=1),
    "negative": lambda x: F.cross_entropy(x, y, label_smoothing=-1.0),
}
own = {"Tensor.softmax", "axis", "negative"}  # torch's under a patch, too
expected = {name: call(x) for name, call in calls.items()}
graphs = []

def backend(graph, inputs):
    from torch._dynamo.backends.debugging import aot_eager
    graphs.append(graph.code)
    return aot_eager(graph, inputs)

compiled = {name: torch.compile(call, backend=backend, fullgraph=True, dynamic=DYNAMIC) for name, call in calls.items()}

def run(stage, ours):
    for name, call in compiled.items():
        graphs.clear()
        result = call(x)
        (gradient,) = torch.autograd.grad(result.pow(2).sum(), x)
        (wanted,) = torch.autograd.grad(expected[name].pow(2).sum(), x, retain_graph=True)
        torch.testing.assert_close((result, gradient), (expected[name], wanted), msg=f"{stage} {name}")
        if graphs:
            assert ("softmax_ext" in graphs[0]) == (ours and name not in own), (stage, name, graphs[0])
        else:
            assert stage != "fresh" and name == "Tensor.softmax", (stage, name)
"""
CASES = {
    "compiled under the patch": """
with softmax_ext.patch(report=True) as patched:
    run("fresh", True)
assert str(patched.report) == "no calls", patched.report
run("after", False)
torch.compiler.reset()
run("fresh", False)
""",
    "compiled before the patch": """
run("fresh", False)
with softmax_ext.patch(report=True) as patched:
    run("patched", True)
    torch.compiler.reset()
    run("fresh", True)
assert str(patched.report) == "no calls", patched.report
run("after", False)
with softmax_ext.patch():
    run("again", True)
""",
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_compile(case, dynamic):
    """No errors whatever the order, and no calls counted; compiled code follows the patch but for methods."""
    result = python("-c", COMPILE.replace("DYNAMIC", str(dynamic)) + CASES[case])
    assert result.returncode == 0, result.stderr


def test_it_does_not_import_dynamo():
    script = "import sys, softmax_ext\nsoftmax_ext.patch()\nassert 'torch._dynamo' not in sys.modules"
    assert python("-c", script).returncode == 0


# ---- threads, and who else looks for modules -----------------------------------------------------------------------


ORIGINAL = F.softmax


def test_threads_that_patch_and_unpatch():
    wrong = []

    def work() -> None:
        for _ in range(200):
            with softmax_ext.patch():
                if F.softmax is ORIGINAL:
                    wrong.append("not patched")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert F.softmax is ORIGINAL


def test_one_patch_entered_twice():
    patched = softmax_ext.patch()
    with patched:
        with patched:
            pass
        assert F.softmax is not ORIGINAL
    assert F.softmax is ORIGINAL


@pytest.mark.parametrize(
    "name", ["F.cross_entropy", "F.softmax", "torch.softmax", "Tensor.softmax", "Tensor.log_softmax"]
)
def test_a_patched_function_is_pickled_by_its_name(name):
    owner, attribute = {"F": F, "torch": torch, "Tensor": Tensor}[name.split(".")[0]], name.split(".")[1]
    with softmax_ext.patch():
        stored = pickle.dumps(getattr(owner, attribute))
        assert pickle.loads(stored) is getattr(owner, attribute)
    assert pickle.loads(stored) is getattr(owner, attribute)
