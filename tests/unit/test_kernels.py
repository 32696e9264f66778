"""The kernels as such: their exponential, their tanh, and every instruction set that runs here."""

import oracle
import pytest
import torch
from cross_entropy_checks import KINDS, LAYOUTS, Strategy, check_product
from torch import Tensor

import softmax_ext
from softmax_ext import ops

of_the_cpu = pytest.mark.devices("cpu")


# ---- exp -------------------------------------------------------------------------------------------------------------

SMALLEST_NORMAL = -87.3365402  # the float32 of which the exponential is the smallest normal number


def kernel_exp(x: Tensor) -> Tensor:
    from softmax_ext import _C  # here, since it is in the source folder alone

    return torch.tensor(_C.exp_nonpositive(x.tolist()), dtype=torch.float32)


def arguments() -> Tensor:
    """Over all of [-87.3, 0]: evenly, by magnitude, and densely where the reduction changes its integer."""
    even = torch.linspace(SMALLEST_NORMAL, 0, 200_000, dtype=torch.float64).float()
    small = -torch.logspace(-38, 1.9, 50_000, dtype=torch.float64).float()
    turns = -torch.arange(0.5, 126, dtype=torch.float64) * torch.log(torch.tensor(2.0, dtype=torch.float64))
    around = (turns[:, None] * (1 + torch.arange(-50, 51) * oracle.roundoff(torch.float32))).float().flatten()
    # The last is the worst of all float32 between -87.3 and -8.
    x = torch.cat([even, small, around, torch.tensor([0.0, -0.0, SMALLEST_NORMAL, -59.921878814697266])])
    return x[x >= torch.tensor(SMALLEST_NORMAL)]


@of_the_cpu
def test_exp_is_within_its_ulps(isa):
    x = arguments()
    exact = x.double().exp()
    ulp = torch.finfo(torch.float32).eps * torch.exp2(exact.log2().floor())
    error = (kernel_exp(x).double() - exact).abs() / ulp
    worst = error.argmax()
    assert error[worst] <= oracle.EXP_ULPS, f"{error[worst]:.3f} ULP at {x[worst].item()!r}"


@of_the_cpu
def test_tanh_is_within_its_ulps(isa):
    """Of the CPU's float32: the log-sum-exp of a single class is its logit."""
    u = torch.cat([torch.linspace(0, 10, 200_000), torch.linspace(0.99, 1.01, 50_000), torch.logspace(-37, 1, 50_000)])
    u = torch.cat([u, -u])
    target = torch.zeros(len(u), dtype=torch.int64)
    z = softmax_ext.cross_entropy(u[:, None], target, softcap=1.0, return_stats=True)[1].lse
    exact = u.double().tanh()
    ulp = torch.finfo(torch.float32).eps * torch.exp2(exact.abs().log2().floor())
    error = ((z.double() - exact).abs() / ulp).nan_to_num(0)
    worst = error.argmax()
    assert error[worst] <= 1.2, f"{error[worst]:.3f} ULP at {u[worst].item()!r}"
    assert torch.equal(z[u == 0], u[u == 0])


@of_the_cpu
def test_exp_never_falls_where_its_argument_rises(isa):
    """Softmax is monotone because of it. Also across the turns, where the polynomial starts again."""
    assert torch.all(kernel_exp(arguments().sort().values).diff() >= 0)


@of_the_cpu
def test_exp_of_zero_is_one(isa):
    assert torch.all(kernel_exp(torch.zeros(33)) == 1)


@of_the_cpu
def test_exp_is_zero_below_the_normal_numbers(isa):
    below = torch.nextafter(torch.tensor(SMALLEST_NORMAL), torch.tensor(-100.0)).item()
    x = torch.cat([torch.linspace(-200, below, 1000), torch.tensor([below, -1e4, -3e38, float("-inf")])])
    x = x.clamp(max=below)
    assert torch.all(kernel_exp(x) == 0)


@of_the_cpu
def test_exp_of_nan_is_nan(isa):
    assert kernel_exp(torch.full((17,), float("nan"))).isnan().all()


@of_the_cpu
def test_exp_treats_every_position_alike(isa):
    """Whole vectors and the rest of a run."""
    x = torch.linspace(-5, 0, 67)
    whole = kernel_exp(x)
    for n in range(1, 40):
        assert torch.equal(kernel_exp(x[:n]), whole[:n])


# ---- instruction sets ------------------------------------------------------------------------------------------------


@of_the_cpu
def test_an_isa_that_is_not_there_is_refused():
    before = ops.library.selected_isa()
    with pytest.raises(ValueError, match=r"select_isa: isa must be one of .*; got ALTIVEC\."):
        ops.library.select_isa("ALTIVEC")
    assert ops.library.selected_isa() == before


@of_the_cpu
def test_available_isas_are_among_the_compiled():
    assert ops.library.selected_isa() in ops.library.available_isas()
    assert set(ops.library.available_isas()) <= set(ops.library.compiled_isas())
    assert ops.library.compiled_isas()[0] == "DEFAULT"


@of_the_cpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_cross_entropy_on_every_isa(isa, dtype, kind):
    assert ops.library.selected_isa() == isa
    strategies = [Strategy(False, False, False), Strategy(True, True, True)]
    for shape in [(9,), (131, 3), (2, 33), (2, 40, 3), (1, 5000)]:
        check_product(shape, dtype, kind, torch.device("cpu"), LAYOUTS[:2], strategies)


@of_the_cpu
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_softmax_on_every_isa(isa, dtype, log):
    function = softmax_ext.log_softmax if log else softmax_ext.softmax
    for shape, dim in [((9,), 0), ((131, 3), 1), ((2, 33), 1), ((2, 40, 3), 1), ((1, 5000), 1), ((5000, 2), 0)]:
        values, upstream = ((3 * torch.randn(shape, dtype=torch.float64)).to(dtype) for _ in range(2))
        exact, exact_grad = oracle.softmax(values, dim, log, upstream)
        x = values.clone().requires_grad_()
        y = function(x, dim)
        y.backward(upstream)
        oracle.assert_within(y, exact, oracle.softmax_tolerance(exact, dim, log, dtype), (shape, dim))
        allowed = oracle.softmax_grad_tolerance(exact, exact_grad, upstream, dim, log, dtype)
        oracle.assert_within(x.grad, exact_grad, allowed, ("gradient", shape, dim))
