"""The workers: that they notice a wrong result, that no variant spoils another, how they measure. On the CPU alone.

What a worker does on a GPU runs here on CPU tensors, with a clock that counts instead of timing.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from workers import linear_worker, measure, problem, torch_worker, worker
from workers.torch_worker import CudaWorkload, TorchWorkload

pytestmark = pytest.mark.devices("cpu")

BENCHMARKS = Path(cases.__file__).parent
SOFTMAXES = [cases.SOFTMAX, cases.LOG_SOFTMAX]

# Fewer rows than problem.Answers takes at most, so that all are compared.
ROWS = Case("rows", (6, 5))
ON_GPU = [ROWS, Case("bf16", (6, 300), "bfloat16"), Case("strided", (2, 5, 3, 2))]
TINY = [
    *ON_GPU,
    Case("transposed", (2, 5, 3), transposed=True),
    Case("probabilities", (6, 5), probabilities=True),
    Case("options", (40, 5), options=True),
]
LINEAR = Case("linear", (300, 100), features=16)
tiny = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
on_gpu = pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.name)


class Counting(measure.Cuda):
    """A GPU's measures without one: milliseconds are the calls so far, memory is 3 MiB."""

    def __init__(self) -> None:
        self.calls = 0
        names = ("synchronize", "reset_peak_memory_stats", "empty_cache")
        memory = {"memory_allocated": lambda: 0, "max_memory_allocated": lambda: 3 * cases.MIB}
        self.torch = SimpleNamespace(cuda=SimpleNamespace(**dict.fromkeys(names, lambda: None), **memory))

    def turn(self, prepare: measure.Prepare, calls: int, head_start_ms: float) -> tuple[list[float], float]:
        call = prepare(calls)
        for _ in range(calls):
            self.calls += 1
            call()
        return [float(self.calls)] * calls, 2.0


def said_of(
    workload: worker.Workload, meter: Any, variants: list[str], whats: list[str], copies: int = 1
) -> dict[tuple[str, str], dict[str, Any]]:
    """What a worker says, by what and variant."""
    lines: list[dict[str, Any]] = []
    request = worker.Request(workload.case, variants, whats, repeats=4, copies=copies)
    worker.work(request, workload, meter, lines.append)
    said = {(line["what"], line["variant"]): line for line in lines}
    assert len(said) == len(lines)
    return said


def on_cpu(case: Case, variants: list[str], whats: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    torch.set_num_threads(1)
    return said_of(TorchWorkload(case, whats), measure.Cpu(), variants, whats)


def as_on_gpu(case: Case, variants: list[str], whats: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    return said_of(CudaWorkload(case, copies=2, device="cpu"), Counting(), variants, whats, copies=2)


def statuses(said: dict[tuple[str, str], dict[str, Any]]) -> dict[str, str]:
    return {variant: line["status"] for (_, variant), line in said.items()}


# ---- the right answers -----------------------------------------------------------------------------------------------


@tiny
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_answers_are_those_of_torch_in_float64(case, xp):
    arrays = problem.make(case, SOFTMAXES)
    tensors = {
        name: value if value is None else torch.from_numpy(value)
        for name, value in vars(arrays).items()
        if name != "label_smoothing"
    }
    if xp is torch:
        arrays = problem.Arrays(**tensors, label_smoothing=arrays.label_smoothing)
    answers = problem.Answers(xp, case, arrays)
    x, g = tensors["logits"].double(), tensors["upstream"].double()
    if case.transposed:
        x, g = x.transpose(1, 2), g.transpose(1, 2)
    weight = None if tensors["weight"] is None else tensors["weight"].double()
    target = tensors["target"].double() if case.probabilities else tensors["target"]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, target, weight, label_smoothing=arrays.label_smoothing)

    def check(what: str, function: Callable[[torch.Tensor], torch.Tensor], upstream: torch.Tensor | None) -> None:
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        value.backward(upstream)
        right, gradient = answers.expect(what)
        rows = [problem.as_rows(np, one.numpy(), 1) for one in (value.detach(), leaf.grad) if one.dim()]
        np.testing.assert_allclose(np.asarray(right), rows[0] if value.dim() else value.item(), rtol=1e-12)
        if gradient is not None:
            np.testing.assert_allclose(np.asarray(gradient), rows[-1], rtol=1e-9, atol=1e-15)

    check(cases.LOSS, loss, None)
    check(cases.FORWARD, loss, None)
    check(cases.SCALED, lambda x: 0.5 * loss(x), None)
    check(cases.SOFTMAX, lambda x: F.softmax(x, 1), g)
    check(cases.LOG_SOFTMAX, lambda x: F.log_softmax(x, 1), g)


@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_errors_are_relative(xp):
    expected = xp.asarray([[0.5, -0.4, -0.1]], dtype=xp.float64)
    assert problem.relative_error(xp, expected, expected) == 0
    assert problem.relative_error(xp, expected * 1.5, expected) == pytest.approx(0.5)
    for value in (np.nan, np.inf):
        assert problem.relative_error(xp, xp.where(expected == -0.1, value, expected), expected) == np.inf
    ignored = xp.zeros((1, 2), dtype=xp.float64)
    assert problem.relative_error(xp, ignored + 1e-30, ignored) == np.inf
    assert problem.relative_error(xp, expected[:, :2], expected) == np.inf


def test_bfloat16_values():
    values = np.random.default_rng(0).standard_normal(1000, dtype=np.float32)
    rounded = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(problem.to_bfloat16_values(values), rounded)


# ---- every variant ---------------------------------------------------------------------------------------------------


@tiny
def test_every_variant_is_right(case):
    whats = [cases.LOSS, cases.FORWARD, *SOFTMAXES, cases.MEMORY]
    said = on_cpu(case, [cases.EAGER, *cases.OURS, cases.MUL, cases.SUM], whats)
    expected = {(what, variant) for what in whats for variant in (cases.EAGER, cases.DEFAULT)}
    expected |= {(what, variant) for what in (cases.LOSS, cases.MEMORY) for variant in cases.OURS}
    assert set(said) == expected | {(cases.LOSS, cases.MUL), (cases.FORWARD, cases.SUM)}
    assert {line["status"] for line in said.values()} == {"ok"}


@on_gpu
def test_every_variant_is_right_on_a_gpu(case):
    """And what is not installed, or not for the shape, is said or left out."""
    whats = [cases.LOSS, cases.SCALED, cases.FORWARD, *SOFTMAXES, cases.MEMORY]
    said = as_on_gpu(case, [cases.EAGER, cases.LIGER, *cases.OURS, cases.COPY, cases.SUM], whats)
    peers = {pair: said.pop(pair) for pair in [*said] if pair[1] == cases.LIGER}
    assert {line["status"] for line in peers.values()} == ({"unavailable"} if len(case.shape) == 2 else set())
    assert {line["status"] for line in said.values()} == {"ok"}
    expected = {(what, variant) for what in whats for variant in (cases.EAGER, cases.DEFAULT)}
    expected |= {(what, variant) for what in (*whats[:2], cases.MEMORY) for variant in cases.OURS}
    assert set(said) == expected | {(what, cases.COPY) for what in whats[:2]} | {(cases.FORWARD, cases.SUM)}
    assert said[cases.LOSS, cases.EAGER]["n"] == 4
    assert said[cases.MEMORY, cases.EAGER]["median"] == 3


def off_by_a_factor(input, *arguments, **options):
    options.pop("label_smoothing", None)
    return 1.001 * F.cross_entropy(input, *arguments)


def blind_to_all_but_the_target(input, *arguments, **options):
    """The right loss, with the gradient of -z_y alone: what is missing is small beside the target's."""
    loss = F.cross_entropy(input, *arguments)
    nll = -input.gather(1, arguments[0][:, None]).mean()
    return nll + (loss - nll).detach()


@pytest.mark.parametrize("where", [on_cpu, as_on_gpu])
@pytest.mark.parametrize("wrong", [off_by_a_factor, blind_to_all_but_the_target])
@pytest.mark.parametrize("shape", [(6, 5), (6, 20000)], ids=str)
def test_a_wrong_result_is_noticed(where, wrong, shape, monkeypatch):
    monkeypatch.setattr(torch_worker.softmax_ext, "cross_entropy", wrong)
    said = where(Case("rows", shape), [cases.EAGER, cases.DEFAULT], [cases.LOSS])
    assert statuses(said) == {cases.EAGER: "ok", cases.DEFAULT: "WRONG"}
    assert "off by" in said[cases.LOSS, cases.DEFAULT]["note"]


@on_gpu
@pytest.mark.parametrize("what", [cases.LOSS, cases.SCALED, cases.FORWARD])
def test_a_variant_that_overwrites_does_not_spoil_another(case, what, monkeypatch):
    """As Liger-Kernel's forward does, behind autograd's back; it comes first, and its turns alternate with others'."""

    def overwriting(input, *arguments):
        loss = F.cross_entropy(input, *arguments)
        input.detach().zero_()
        return loss

    monkeypatch.setattr(CudaWorkload, "_peers", lambda self: {cases.QUACK: overwriting})
    workload = CudaWorkload(case, copies=2, device="cpu")
    logits = [one.clone() for one in workload.logits]
    ours = workload.variants(what)[cases.DEFAULT]
    before = [ours(2)()[0] for _ in range(2)]
    said = said_of(workload, Counting(), [cases.QUACK, cases.EAGER, cases.DEFAULT], [what], copies=2)
    assert statuses(said)[cases.EAGER] == statuses(said)[cases.DEFAULT] == "ok"
    assert torch.equal(torch.stack(workload.logits), torch.stack(logits))
    assert [ours(2)()[0] for _ in range(2)] == before


@pytest.mark.parametrize("workload", [TorchWorkload(ROWS, []), CudaWorkload(ROWS, 2, "cpu")], ids=["cpu", "gpu"])
def test_overwritten_inputs_are_copied_anew(workload):
    """Each turn has the logits, not the gradient of the turn before."""
    for what in (cases.LOSS, cases.MEMORY):
        prepare = workload.variants(what)[cases.INPLACE]
        turns = []
        for _ in range(2):
            call = prepare(2)
            turns.append([call()[0].item() for _ in range(2)])
        assert turns[0] == turns[1]
        assert turns[0][0] != turns[0][1]  # other logits: on the CPU the first call's gradient


@pytest.mark.parametrize(
    ("error", "name", "status"),
    [
        (ImportError("no module\nand more of it"), cases.LIGER, "unavailable"),
        (RuntimeError("no compiler"), cases.COMPILE, "unavailable"),
        (RuntimeError("illegal memory access"), cases.DEFAULT, "failed"),
        (torch.OutOfMemoryError("of 3 GiB"), cases.EAGER, "skipped"),
    ],
)
@pytest.mark.parametrize("what", [cases.LOSS, cases.MEMORY])
def test_a_variant_that_raises_does_not_end_the_others(error, name, status, what, monkeypatch):
    def raising(calls: int) -> None:
        raise error

    monkeypatch.setattr(TorchWorkload, "variants", lambda self, what: {name: raising, "fine": lambda calls: lambda: 0})
    monkeypatch.setattr(TorchWorkload, "complaint", lambda self, what, result: "")
    said = on_cpu(ROWS, [name, "fine"], [what])
    assert statuses(said) == {name: status, "fine": "ok"}
    assert said[what, name]["note"] == f"{type(error).__name__}: {str(error).splitlines()[0]}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_variants_are_right_and_a_wrong_one_is_found(dtype):
    workload = linear_worker.LinearWorkload(Case("linear", (300, 100), dtype, features=16), "cpu")
    variants = workload.variants(cases.LOSS)
    for name in {cases.EAGER, cases.CHUNKED, cases.DEFAULT} & set(variants):
        assert workload.complaint(cases.LOSS, variants[name](1)()) == ""
    loss, of_rows, of_classes = variants[cases.DEFAULT](1)()
    for result, said in [
        ((1.05 * loss, of_rows, of_classes), "loss: relative error"),
        ((loss, 0.9 * of_rows, of_classes), "gradient of the input"),
        ((loss, of_rows, 0.9 * of_classes), "gradient of the weight"),
    ]:
        assert said in workload.complaint(cases.LOSS, result)


def test_memory_of_linear_is_without_the_gradients():
    workload = linear_worker.LinearWorkload(LINEAR, "cpu")
    said = said_of(workload, Counting(), [cases.EAGER], [cases.LOSS, cases.MEMORY])
    assert said[cases.LOSS, cases.EAGER]["status"] == "ok"
    assert said[cases.MEMORY, cases.EAGER]["median"] == 3 - 400 * 16 * 4 / cases.MIB


# ---- measuring -------------------------------------------------------------------------------------------------------


def turns_of(meter: Any, repeats: int, copies: int) -> tuple[list[str], dict[str, measure.Summary]]:
    turns: list[str] = []
    variants = {name: (lambda calls, name=name: lambda: turns.append(name)) for name in "ab"}
    measured = meter.times_ms(variants, repeats, copies)
    return turns, measured


def test_variants_take_turns():
    turns, measured = turns_of(measure.Cpu(), repeats=3, copies=1)
    in_turn = [name for name, before in zip(turns, [None, *turns], strict=False) if name != before]
    assert in_turn == ["a", "b"] * (1 + measure.UNTIMED_ROUNDS + 3)  # the first: how many calls make a sample
    assert measured["a"].n == 3
    assert measured["a"].q1 <= measured["a"].median <= measured["a"].q3


def test_variants_take_turns_on_a_gpu():
    turns, measured = turns_of(Counting(), repeats=7, copies=3)
    assert {name: summary.n for name, summary in measured.items()} == {"a": 9, "b": 9}
    assert "".join(turns) == "aaabbb" * (measure.UNTIMED_ROUNDS + 3)


def test_what_takes_seconds_is_called_less_often(monkeypatch):
    called = {"slow": 0, "slower": 0, "quick": 0}
    seconds = {"slow": 3.0, "slower": 30.0, "quick": 0.001}
    monkeypatch.setattr(measure, "_seconds", lambda prepare, calls: prepare(calls))

    def variant(name: str) -> object:
        def prepare(calls: int) -> float:
            called[name] += 1
            return seconds[name]

        return prepare

    summaries = measure.Cpu().times_ms({name: variant(name) for name in called}, 5)
    assert {name: summary.n for name, summary in summaries.items()} == {"slow": 5, "slower": 1, "quick": 5}
    assert called == {"slow": 5, "slower": 1, "quick": 1 + measure.UNTIMED_ROUNDS + 2 * 5}


@pytest.mark.parametrize("keeps_memory", [False, True])
def test_memory_is_the_peak(keeps_memory):
    def step() -> None:
        first = np.ones(2**23)  # 64 MiB
        del first
        np.ones(2**22)

    assert measure.Cpu().peak_mib(lambda calls: step, keeps_memory) == pytest.approx(64, abs=8)


KEPT_GRADIENT = """
import torch
from workers import measure
import softmax_ext
logits = torch.randn(1009, 10007, requires_grad=True)
target = torch.zeros(1009, dtype=torch.long)
def step():
    softmax_ext.cross_entropy(logits, target).backward()
    logits.grad = None
print(measure.Cpu().peak_mib(lambda calls: step))
"""


def test_kept_memory_counts_when_it_is_used(monkeypatch):
    """The gradient of a step lies where that of the step before lay; it is memory that the step adds all the same."""
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    command = [sys.executable, "-c", KEPT_GRADIENT]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 38 <= float(printed) <= 60


def test_a_worker_answers_one_request_after_the_other(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    request = {"variants": [cases.EAGER], "whats": [cases.LOSS], "repeats": 2}
    for case, module in [(ROWS, "torch_worker"), (LINEAR, "linear_worker")]:
        line = json.dumps({**request, "case": vars(case)}) + "\n"
        command = [sys.executable, "-m", f"workers.{module}"]
        process = subprocess.run(command, input=2 * line, capture_output=True, text=True, check=True)
        said = [json.loads(line) for line in process.stdout.splitlines()]
        assert [line.get("status") for line in said] == 2 * ["ok", None]
