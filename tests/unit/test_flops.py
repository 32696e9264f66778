"""FlopCounterMode counts the matrix products of linear_cross_entropy: 2 N D C for each, by each plan."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_checks import NAMES, limits_for, operands
from processes import python
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from softmax_ext import LinearCrossEntropyLoss, linear_cross_entropy, linear_plan, matmul

pytestmark = pytest.mark.devices("cpu")

N, D, C = 40, 16, 600
PRODUCT = 2 * N * D * C


def counted(call: Any) -> int:
    with FlopCounterMode(display=False) as mode:
        call()
    return mode.get_total_flops()


@pytest.fixture
def multiplied(monkeypatch) -> list[int]:
    """2 m k n of each product that is computed, by the factors that matmul.py is given."""
    found: list[int] = []

    def watch(name: str, factors: Any) -> None:
        function = getattr(matmul, name)

        def watching(*args: Any) -> Any:
            (m, k), n = factors(*args)
            found.append(2 * m * k * n)
            return function(*args)

        monkeypatch.setattr(matmul, name, watching)

    watch("project", lambda x, matrix, bias, out: (x.shape, matrix.shape[0]))
    watch("add_product", lambda total, dz, matrix, first: (dz.shape, matrix.shape[1]))
    watch("add_outer", lambda total, dz, x, first: (dz.t().shape, x.shape[1]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step(name, dtype, multiplied):
    x, w, y = operands(N, D, C, dtype)
    limits = limits_for(name, (N, D, C), dtype)
    products = linear_plan(N, D, C, dtype, **limits).products
    count = counted(lambda: linear_cross_entropy(x, w, y, **limits).backward())
    assert count == sum(multiplied)
    assert count == pytest.approx(products * PRODUCT, rel=0.005), "products is rounded"
    assert (name == "classes") == (products > 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_computed_twice(name, multiplied):
    """Forward has one product, and backward three, whether the state of the rows is kept or not."""
    x, w, y = operands(N, D, C, torch.float32)
    limits = limits_for(name, (N, D, C), torch.float32)
    losses = []
    forward = counted(lambda: losses.append(linear_cross_entropy(x, w, y, reduction="none", **limits)))
    assert forward == PRODUCT == sum(multiplied)
    assert counted(lambda: losses[0].sum().backward()) == 3 * PRODUCT == sum(multiplied) - PRODUCT
    multiplied.clear()
    loss = linear_cross_entropy(x, w, y, **limits)
    loss.backward(retain_graph=True)
    multiplied.clear()
    again = counted(loss.backward)  # has no state, so that classes goes through the logits twice
    assert again == sum(multiplied)
    assert again > 3 * PRODUCT if name == "classes" else again == 3 * PRODUCT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leaves", ["input", "weight", "none"])
def test_only_the_products_that_are_needed(name, leaves, multiplied):
    x, w, y = operands(N, D, C, torch.float32)
    x.requires_grad_(leaves == "input")
    w.requires_grad_(leaves == "weight")
    limits = limits_for(name, (N, D, C), torch.float32)
    count = counted(lambda: linear_cross_entropy(x, w, y, **limits))
    assert count == sum(multiplied)
    if name != "classes":
        assert count == (1 if leaves == "none" else 2) * PRODUCT


@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_are_not_counted(name, multiplied):
    x, w, y = operands(N, D, C, torch.float32)
    y[::4] = -100
    limits = limits_for(name, (N, D, C), torch.float32)
    count = counted(lambda: linear_cross_entropy(x, w, y, **limits).backward())
    assert count == sum(multiplied)
    if name != "classes":
        assert count == 3 * PRODUCT * 3 // 4


@pytest.mark.parametrize("name", NAMES)
def test_more_dimensions(name, multiplied):
    x = torch.randn(N, D, requires_grad=True)
    w = torch.randn(C, 2, 3, D, requires_grad=True)
    y = torch.randint(0, C, (N, 2, 3))
    limits = limits_for(name, (N, D, C), torch.float32, 6)
    count = counted(lambda: linear_cross_entropy(x, w, y, **limits).backward())
    assert count == sum(multiplied)
    if name != "classes":
        assert count == 3 * 6 * PRODUCT


def test_probabilities_and_their_gradient(multiplied):
    x, w, _ = operands(N, D, C, torch.float32)
    q = torch.rand(N, C).softmax(1).requires_grad_()
    assert counted(lambda: linear_cross_entropy(x, w, q).backward()) == 4 * PRODUCT == sum(multiplied)


def test_through_all_logits():
    """Nothing is counted twice where torch's own products are counted."""
    x, w, _ = operands(N, D, C, torch.float32)
    weight, q = torch.rand(C, requires_grad=True), torch.rand(N, C).softmax(1)
    ours = counted(lambda: linear_cross_entropy(x, w, q, weight=weight).backward())
    assert ours == 3 * PRODUCT == counted(lambda: F.cross_entropy(F.linear(x, w), q, weight).backward())


def test_checkpoint():
    x, w, y = operands(N, D, C, torch.float32)
    step = lambda: checkpoint(lambda: linear_cross_entropy(x, w, y), use_reentrant=False).backward()  # noqa: E731
    assert counted(step) == (1 + 1 + 3) * PRODUCT, "a forward, the forward again, and three in backward"


def test_by_module():
    module = torch.nn.Sequential(torch.nn.Linear(8, D))
    module.loss = LinearCrossEntropyLoss(D, C)
    module.forward = lambda x, y: module.loss(module[0](x), y)
    with FlopCounterMode(display=False) as mode:
        module(torch.randn(N, 8), torch.randint(0, C, (N,))).backward()
    of_loss = mode.get_flop_counts()["Sequential.loss"]
    assert of_loss == {torch.ops.softmax_ext.linear_cross_entropy: 3 * PRODUCT}


def test_without_values():
    """On meta every row counts: nobody knows which are ignored."""
    x, w, y = (t.detach().to("meta").requires_grad_(t.is_floating_point()) for t in operands(N, D, C, torch.float32))
    assert counted(lambda: linear_cross_entropy(x, w, y).backward()) == 3 * PRODUCT


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
        y = torch.zeros(N, dtype=torch.int64)
        assert counted(lambda: linear_cross_entropy(x, w, y).backward()) == 3 * PRODUCT


IMPORTS = {
    "before": "import torch.utils.flop_counter, softmax_ext",
    "after": "import softmax_ext, sys; assert 'torch.utils.flop_counter' not in sys.modules",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_the_order_of_imports(order):
    script = f"""
{IMPORTS[order]}
import sys, torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as mode:
    softmax_ext.linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, 4]))
print(mode.get_total_flops(), [f for f in sys.meta_path if type(f).__module__ == "softmax_ext.imports"])
"""
    result = python("-c", script)
    assert result.stdout.split(maxsplit=1) == ["60", "[]\n"], result.stderr


def test_whoever_only_looks_for_the_module_takes_nothing():
    """A library asks by find_spec whether there is a module."""
    code = """
import importlib.util, torch, softmax_ext
assert importlib.util.find_spec("torch.utils.flop_counter") is not None
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as mode:
    softmax_ext.linear_cross_entropy(torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64))
print(mode.get_total_flops())
"""
    result = python("-c", code)
    assert result.stdout.strip() == str(2 * 4 * 3 * 5), result.stderr
