"""softmax and log_softmax: values and gradients against float64, and the properties that define a softmax."""

import inspect
import itertools
import math
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import contiguous, reversed_dims, stepped
from torch import Tensor
from torch.testing import assert_close

import softmax_ext
from softmax_ext import log_softmax, softmax

FUNCTIONS = {False: softmax, True: log_softmax}

# One vector of each ISA and its neighbours, both layouts, more than one block, every dim of many ranks.
SHAPES = [
    (1,),
    (7,),
    (5000,),
    (5, 1),
    (4, 2),
    (131, 3),
    (3, 15),
    (3, 16),
    (3, 17),
    (2, 33),
    (3, 40),
    (2, 1000),
    (2, 5, 9),
    (2, 40, 3),
    (3, 4, 2, 5),
    (2, 3, 4, 2, 3),
]


def check(values: Tensor, dim: int, log: bool, result: torch.dtype | None = None, what: object = "") -> None:
    """Forward and backward within the table's bounds. ``result``: the dtype argument."""
    output = result or values.dtype
    upstream = torch.randn(values.shape, dtype=torch.float64).to(output).to(values.device)
    exact, exact_grad = oracle.softmax(values, dim, log, upstream)
    x = values.detach().requires_grad_()
    y = FUNCTIONS[log](x, dim) if result is None else FUNCTIONS[log](x, dim, result)
    assert y.dtype == output
    y.backward(upstream)
    assert x.grad.dtype == values.dtype
    work = oracle.arithmetic(values.dtype, output)
    allowed = oracle.softmax_tolerance(exact, dim, log, output, arithmetic_dtype=work)
    oracle.assert_within(y, exact, allowed, ("value", what))
    allowed = oracle.softmax_grad_tolerance(exact, exact_grad, upstream, dim, log, output, values.dtype)
    oracle.assert_within(x.grad, exact_grad, allowed, ("gradient", what))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dim_and_layout(shape, dtype, log, device):
    values = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)
    for dim, layout in itertools.product(range(-len(shape), len(shape)), [contiguous, reversed_dims, stepped]):
        check(layout(values), dim, log, what=(dim, layout.__name__))
    for dim in range(len(shape)):
        check(values[:1].expand(shape), dim, log, what=(dim, "expanded"))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_many_classes(dtype, log, device):
    for shape, dim in [((2, 50257), 1), ((1, 128256), 1), ((5000, 3), 0)]:
        check(torch.randn(shape).to(dtype).to(device), dim, log, what=shape)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("result", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_dtype_of_computation_and_result(dtype, result, log, device):
    for shape, dim in [((3, 40), 1), ((131, 3), 1), ((40, 3), 0), ((2, 72), 1), ((3, 101), 1)]:
        values = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
        check(values, dim, log, result, (shape, dim))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_with_a_dtype(dtype, log, device):
    values = torch.randint(0, 2, (3, 5), device=device).to(dtype)
    ours = FUNCTIONS[log](values, 1, dtype=torch.float32)
    assert torch.equal(ours, FUNCTIONS[log](values.float(), 1))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_no_dimension(dtype, log, device):
    """A single number is a row of one class."""
    for dim in (0, -1):
        x = torch.tensor(3.0, dtype=dtype, device=device, requires_grad=True)
        y = FUNCTIONS[log](x, dim)
        y.backward()
        assert y.shape == ()
        assert y == (0 if log else 1)
        assert x.grad == 0


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 40), (2, 0, 3), (2, 40, 0)], ids=str)
def test_empty(shape, log, device):
    for dim in range(len(shape)):
        x = torch.randn(shape, device=device, requires_grad=True)
        y = FUNCTIONS[log](x, dim)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_infinities_and_nan(dtype, log, device):
    """As torch: -inf is probability 0; a row of -inf, with +inf or with NaN is NaN, and no other row is."""
    inf = float("inf")
    for classes in (3, 17, 40, 5000):
        values = torch.randn(7, classes).to(dtype)
        values[0, 1] = -inf
        values[1] = -inf
        values[2, 1] = inf
        values[3, -1] = float("nan")
        values[4, 1:] = -inf
        values[5, : classes // 2] = -inf
        for v in (values, values.t().contiguous().t()):
            exact = (F.log_softmax if log else F.softmax)(v.double(), 1)
            y = FUNCTIONS[log](v.to(device), 1)
            oracle.assert_within(y, exact, oracle.softmax_tolerance(exact.nan_to_num(0), 1, log, dtype), classes)


@pytest.mark.parametrize("log", [False, True])
def test_gradient_beside_minus_infinity(log, device):
    """A class that cannot occur has no gradient of its own in softmax, and passes its upstream on in log_softmax."""
    for classes in (3, 40):
        values = torch.randn(2, classes, device=device)
        values[0, 1] = -float("inf")
        check(values, 1, log)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_log_softmax_near_certainty(dtype, device):
    """Log p = -1e-7 is not 0: relative to itself."""
    values = torch.zeros(2, 40, dtype=torch.float64)
    values[:, 3] = math.log(39 / 1e-7)
    values = values.to(dtype)
    others = values.double()[:, :1] - values.double()[:, 3:4]
    exact = -(39 * others.exp()).log1p()
    ours = log_softmax(values.to(device), 1).cpu().double()[:, 3:4]
    oracle.assert_within(ours, exact, oracle.tolerance("log_softmax", exact, dtype, scale=exact * (1 - others)), dtype)


# ---- properties ------------------------------------------------------------------------------------------------------

EXAMPLE = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)
EXAMPLE_SOFTMAX = (0.7054, 0.2595, 0.0351)


@pytest.mark.parametrize("added", [0.0, 10.0, 10000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_worked_example(dtype, added, device):
    """softmax(2, 1, -1), unchanged by a shift.

    The example is often printed with 0.7051 and 0.0354, an arithmetic slip: e^2 / (e^2 + e + e^-1) = 7.38906 / 10.47522
    = 0.70538, and e^-1 / 10.47522 = 0.03512.
    """
    ours = softmax((EXAMPLE + added).to(dtype).to(device), 0).cpu()
    assert tuple(round(p, 4) for p in ours.tolist()) == EXAMPLE_SOFTMAX
    total = math.fsum(math.exp(x) for x in EXAMPLE.tolist())
    exact = torch.tensor([math.exp(x) / total for x in EXAMPLE.tolist()], dtype=torch.float64)
    oracle.assert_within(ours, exact, oracle.softmax_tolerance(exact, 0, False, dtype), added)
    assert torch.equal(ours, softmax(EXAMPLE.to(dtype).to(device), 0).cpu()), "a shift that is exact changes no bit"


@st.composite
def rows(draw, magnitude: float = 100.0):
    """[rows, classes] with few or many classes, of any floating dtype, in one of two layouts."""
    dtype = draw(st.sampled_from(oracle.DTYPES))
    classes = draw(st.integers(1, 70))
    count = draw(st.integers(1, 4))
    values = st.floats(-magnitude, magnitude, width=32)
    flat = draw(st.lists(values, min_size=count * classes, max_size=count * classes))
    x = torch.tensor(flat, dtype=torch.float64).reshape(count, classes).to(dtype)
    return draw(st.sampled_from([x, x.t().contiguous().t()]))


properties = settings(max_examples=60, deadline=None, derandomize=True)


@properties
@given(rows())
def test_is_a_distribution(x):
    p = softmax(x, 1)
    assert torch.all((p >= 0) & (p <= 1))
    one = torch.ones(x.shape[0], dtype=torch.float64)
    exact = x.double().softmax(1)
    allowed = oracle.softmax_tolerance(exact, 1, False, x.dtype).sum(1)
    oracle.assert_within(p.double().sum(1), one, allowed, "sum")


@properties
@given(rows())
def test_is_monotone(x):
    """A larger logit never has a smaller probability; equal logits have equal ones."""
    order = x.argsort(1)
    for function in FUNCTIONS.values():
        assert torch.all(function(x, 1).gather(1, order).double().diff(dim=1) >= 0)
    p = softmax(x, 1)
    assert torch.all((x[:, :1] != x) | (p[:, :1] == p))


@properties
@given(rows(), st.integers(-1000, 1000))
def test_is_shift_invariant(x, shift):
    """Bit by bit where the shift itself is exact: multiples of 2^-4 below 2^11 in float32."""
    x = (x.float() * 16).round() / 16
    for function in FUNCTIONS.values():
        assert torch.equal(function(x + shift, 1), function(x, 1))


@properties
@given(rows(), st.randoms(use_true_random=False))
def test_is_permutation_equivariant(x, random):
    """Up to the order of summation."""
    order = list(range(x.shape[1]))
    random.shuffle(order)
    for log, function in FUNCTIONS.items():
        exact = function(x.double(), 1)[:, order]
        allowed = 2 * oracle.softmax_tolerance(exact, 1, log, x.dtype)
        oracle.assert_within(function(x[:, order], 1), function(x, 1)[:, order].double(), allowed, order)


@properties
@given(rows())
def test_log_softmax_is_the_logarithm(x):
    wide = x.double()
    p, log_p = softmax(wide, 1), log_softmax(wide, 1)
    assert torch.all(log_p <= 0)
    oracle.assert_within(log_p.exp(), p, oracle.softmax_tolerance(p, 1, False, torch.float64), "exp")


# ---- the signature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_arguments_are_torchs(name):
    """By name and with torch's defaults; dtype is third here, where torch has _stacklevel."""
    theirs = inspect.signature(getattr(F, name)).parameters
    ours = inspect.signature(getattr(softmax_ext, name)).parameters
    assert list(ours) == ["input", "dim", "dtype", "_stacklevel"]
    assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4), (2, 3, 4, 5)])
def test_dim_left_out(name, shape, device):
    """torch's choice, and its warning at the line of the call."""
    x = torch.randn(shape, device=device)
    module = {"softmax": softmax_ext.Softmax, "log_softmax": softmax_ext.LogSoftmax}[name]()
    calls = {
        "function": lambda f: f(x),
        "None": lambda f: f(x, None),
        "_stacklevel": lambda f: (lambda: f(x, _stacklevel=4))(),
        "module": lambda f: module(x),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(F, name)(x.cpu())
    for label, call in calls.items():
        with pytest.warns(UserWarning, match=f"^Implicit dimension choice for {name} has been deprecated") as caught:
            ours = call(getattr(softmax_ext, name))
        assert_close(ours.cpu(), theirs, msg=label)
        assert [w.filename for w in caught] == [__file__], label


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_torchs_third_argument(name):
    with pytest.raises(TypeError, match=r"dtype must be .* got 3 .* third argument is dtype; torch has _st"):
        getattr(softmax_ext, name)(torch.randn(3), 0, 3)
    assert getattr(softmax_ext, name)(torch.randn(3), 0, _stacklevel=3, dtype=torch.float64).dtype == torch.float64


def test_modules_are_the_functions(device):
    x = torch.randn(3, 5, device=device)
    assert torch.equal(softmax_ext.Softmax(1)(x), softmax(x, 1))
    assert torch.equal(softmax_ext.LogSoftmax(1)(x), log_softmax(x, 1))
