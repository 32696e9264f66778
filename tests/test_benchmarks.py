"""The benchmarks: what they refuse, that they notice a wrong result, what they write. None of it times anything."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import answers
import bench
import cases
import inputs
import measure
import numpy as np
import pytest
import readme
import results
import torch
import torch.nn.functional as F
import torch_worker
import worker
from cases import Case, Job

pytestmark = pytest.mark.devices("cpu")

BENCHMARKS = Path(bench.__file__).parent

# Fewer rows than answers.checked_rows takes at most, so that all are compared.
TINY = [
    Case("rows", (6, 5)),
    Case("bf16", (6, 300), "bfloat16"),
    Case("strided", (2, 5, 3, 2)),
    Case("transposed", (2, 5, 3), transposed=True),
    Case("probabilities", (6, 5), probabilities=True),
    Case("options", (40, 5), options=True),
]
tiny = pytest.mark.parametrize("case", TINY, ids=[case.name for case in TINY])
VARIANTS = [cases.EAGER, *cases.OURS, cases.MUL, cases.SUM]
ENVIRONMENT = results.Environment(
    cpu="A CPU, of two words",
    processors=8,
    isa="AVX2",
    huge_pages="madvise",
    python="3.12.1",
    torch="2.13.0",
    softmax_ext="0.1.0",
    jax="",
    optax="",
    tensorflow="",
    commit="abc123",
    date="2026-01-02",
)


def work(case: Case, variants: list[str], whats: list[str]) -> list[dict[str, Any]]:
    """What a worker prints, in this process."""
    lines: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    request = worker.Request(case, variants, whats, repeats=2, threads=1)
    worker.work(request, torch_worker.TorchWorkload, lines.append)
    return lines


def records(section: str, of: tuple[Case, ...], median: Callable[[Case, str], float]) -> list[results.Record]:
    """A record for each case and each variant, of time and of memory."""
    made = []
    for case in of:
        for variant in (cases.EAGER, cases.COMPILE, cases.JAX, *cases.OURS, cases.MUL):
            job = Job(section, case, (variant,), (cases.LOSS,), threads=4)
            value = median(case, variant)
            figures = {"median": value, "q1": 0.9 * value, "q3": 1.1 * value, "n": 9}
            made += [results.Record.of(job, variant, what, "ok", **figures) for what in (cases.LOSS, cases.MEMORY)]
    return made


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Results in which eager takes 10 ms, compile 5, all else 2."""
    times = {cases.EAGER: 10.0, cases.COMPILE: 5.0}
    made = []
    for section, of in [("table", cases.TABLE), ("vocabulary", cases.VOCABULARY), ("scaling", cases.SCALING)]:
        made += records(section, of, lambda case, variant: times.get(variant, 2.0))
    results.write_csv(tmp_path / results.CSV_NAME, made, ENVIRONMENT)
    return tmp_path / results.CSV_NAME


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "1 or more; got '0'"),
        (["--repeats", "many"], "1 or more; got 'many'"),
        (["--threads", "100000"], "processors"),
        (["--only", "3x4"], "knows no case '3x4'; there are: 1024x128256-f32"),
        (["--peers", "/no/such/python"], "cannot be run"),
        (["--peers", sys.executable], "neither JAX with optax nor TensorFlow"),
        (["--output", __file__], "needs a directory"),
        (["--quick", "--only", "8x10-f32"], "goes with none of"),
        (["--fast"], "unrecognized"),
    ],
)
def test_bad_arguments_get_a_message(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(bench, "peer_versions", lambda python: {})
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in " ".join(error.split())


def test_the_command_itself():
    """Its imports, and a status of 2 without a traceback."""
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--repeats", "-1"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "1 or more" in process.stderr
    assert "Traceback" not in process.stderr


def test_plans():
    """Every case of the table is timed and has its memory measured by all variants, peers in processes of their own."""
    jobs = cases.plan((cases.JAX,), threads=2)
    for case in cases.TABLE:
        mine = [job for job in jobs if job.case == case and job.section == "table"]
        memory = {variant for job in mine for variant in job.variants if job.whats == (cases.MEMORY,)}
        timed = {variant for job in mine for variant in job.variants if cases.LOSS in job.whats}
        assert memory == timed == {cases.EAGER, cases.COMPILE, *cases.OURS, cases.JAX}
        assert all(job.variants == (cases.JAX,) for job in mine if cases.JAX in job.variants)
    assert [job.threads for job in jobs if job.section == "one thread"] == [1] * len(cases.THREADS)
    assert not [job for job in cases.plan((), threads=1) if job.section == "one thread"]
    assert [job for job in jobs if job.thp]
    assert set(cases.CASES.values()) == {*cases.TABLE, *cases.VOCABULARY, *cases.SCALING}  # no name twice


# ---- correctness ---------------------------------------------------------------------------------------------------


@tiny
def test_answers_are_those_of_torch_in_float64(case):
    arrays = inputs.make(case)
    workload = torch_worker.TorchWorkload(case, arrays, inputs.normals(case, seed=4))
    options = {name: value.double() if name == "weight" else value for name, value in workload.options.items()}
    target = workload.target.double() if case.probabilities else workload.target
    rows = answers.checked_rows(case)

    def check(what: str, function: Callable[[torch.Tensor], torch.Tensor], upstream: torch.Tensor | None) -> None:
        x = workload.leaves[0].detach().double().requires_grad_()
        value = function(x)
        value.backward(upstream)
        expected = answers.expect(what, case, arrays, inputs.normals(case, seed=4))
        as_rows = answers.as_rows(value.detach().numpy(), 1)[rows] if value.dim() else np.array([[value.item()]])
        np.testing.assert_allclose(as_rows, expected.value, rtol=1e-12)
        np.testing.assert_allclose(answers.as_rows(x.grad.numpy(), 1)[rows], expected.gradient, rtol=1e-9, atol=1e-15)

    check(cases.LOSS, lambda x: F.cross_entropy(x, target, **options), None)
    check(cases.SOFTMAX, lambda x: F.softmax(x, 1), workload.upstream.double())
    check(cases.LOG_SOFTMAX, lambda x: F.log_softmax(x, 1), workload.upstream.double())


@tiny
def test_every_variant_is_right(case):
    whats = [cases.LOSS, cases.FORWARD, cases.SOFTMAX, cases.LOG_SOFTMAX, cases.MEMORY]
    lines = work(case, VARIANTS, whats)
    assert [line for line in lines if line["status"] != "ok"] == []
    done = {(line["what"], line["variant"]) for line in lines}
    assert done >= {(cases.LOSS, variant) for variant in (cases.EAGER, *cases.OURS, cases.MUL)}
    assert done >= {(cases.FORWARD, variant) for variant in (cases.EAGER, cases.DEFAULT, cases.SUM)}
    assert done >= {(what, variant) for what in whats[2:] for variant in (cases.EAGER, cases.DEFAULT)}


def off_by_a_factor(input, *arguments, **options):
    return 1.001 * F.cross_entropy(input, *arguments)


def blind_to_all_but_the_target(input, *arguments, **options):
    """The right loss, with the gradient of -z_y alone: what is missing is small beside the target's."""
    loss = F.cross_entropy(input, *arguments)
    nll = -input.gather(1, arguments[0][:, None]).mean()
    return nll + (loss - nll).detach()


@pytest.mark.parametrize("wrong", [off_by_a_factor, blind_to_all_but_the_target])
@pytest.mark.parametrize("shape", [(6, 5), (6, 20000)], ids=str)
def test_a_wrong_result_is_noticed(wrong, shape, monkeypatch):
    monkeypatch.setattr(torch_worker.softmax_ext, "cross_entropy", wrong)
    lines = work(Case("rows", shape), [cases.EAGER, cases.DEFAULT], [cases.LOSS])
    assert {line["variant"]: line["status"] for line in lines} == {cases.EAGER: "ok", cases.DEFAULT: "WRONG"}
    assert "off by" in next(line["note"] for line in lines if line["status"] == "WRONG")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_that_is_not_finite_passes(value):
    expected = np.array([[0.5, -0.4, -0.1]])
    assert answers.relative_error(expected, expected) == 0
    assert answers.relative_error(np.where(expected == -0.1, value, expected), expected) == np.inf


def test_an_ignored_row_must_have_no_gradient():
    assert answers.relative_error(np.array([[0.0, 1e-30]]), np.zeros((1, 2))) == np.inf


def test_a_variant_that_raises_does_not_end_the_others(monkeypatch):
    def without_compiler(*arguments, **options):
        raise RuntimeError("no C++ compiler found\nand more of it")

    monkeypatch.setattr(torch_worker.torch, "compile", without_compiler)
    for what in (cases.LOSS, cases.MEMORY):
        lines = work(TINY[0], [cases.EAGER, cases.COMPILE], [what])
        by_variant = {line["variant"]: line for line in lines}
        assert by_variant[cases.EAGER]["status"] == "ok"
        assert by_variant[cases.COMPILE]["status"] == "unavailable"
        assert by_variant[cases.COMPILE]["note"] == "RuntimeError: no C++ compiler found"


def test_bfloat16_values():
    values = np.random.default_rng(0).standard_normal(1000, dtype=np.float32)
    rounded = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(inputs.to_bfloat16_values(values), rounded)


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_variants_take_turns():
    turns: list[str] = []

    def prepare(name: str) -> measure.Prepare:
        return lambda calls: lambda: turns.append(name)

    measured = measure.times_ms({"a": prepare("a"), "b": prepare("b")}, repeats=3)
    in_turn = [name for name, before in zip(turns, [None, *turns], strict=False) if name != before]
    assert in_turn == ["a", "b"] * (1 + measure.UNTIMED_ROUNDS + 3)  # the first: how many calls make a sample
    assert measured["a"].n == 3
    assert measured["a"].q1 <= measured["a"].median <= measured["a"].q3


@pytest.mark.parametrize("keeps_memory", [False, True])
def test_memory_is_the_peak(keeps_memory):
    def step() -> None:
        first = np.ones(2**23)  # 64 MiB
        del first
        np.ones(2**22)

    assert measure.extra_memory_mib(lambda calls: step, keeps_memory).median == pytest.approx(64, abs=8)


def test_a_job_in_its_process():
    job = Job("table", TINY[0], (cases.EAGER, cases.INPLACE), (cases.LOSS,), threads=1)
    made = bench.run_job(job, 2, None, available=2**40)
    assert {record.variant: record.status for record in made} == dict.fromkeys(
        [cases.EAGER, cases.INPLACE, cases.MUL], "ok"
    )
    assert all(record.unit == "ms" and record.median > 0 and record.n == 2 for record in made)


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch):
    """With what it said before."""
    monkeypatch.setattr(bench, "_HERE", tmp_path)
    line = {
        "what": cases.LOSS,
        "variant": cases.EAGER,
        "status": "ok",
        "note": "",
        "median": 1,
        "q1": 1,
        "q3": 1,
        "n": 2,
    }
    script = f"import os\nprint({json.dumps(line)!r}, flush=True)\nos.kill(os.getpid(), 9)"
    (tmp_path / "torch_worker.py").write_text(script)
    job = Job("table", TINY[0], (cases.EAGER,), (cases.LOSS, cases.SOFTMAX), threads=1)
    loss, softmax = bench.run_job(job, 2, None, available=2**40)
    assert (loss.what, loss.status) == (cases.LOSS, "ok")
    assert (softmax.what, softmax.status) == (cases.SOFTMAX, "failed")
    assert "killed by signal 9" in softmax.note


def test_what_does_not_fit_is_skipped():
    job = Job("scaling", cases.SCALING[-1], (cases.EAGER, cases.INPLACE), (cases.LOSS,), threads=1)
    fitting, skipped = bench.split_by_memory(job, available=job.needed_bytes(cases.INPLACE))
    assert fitting == [cases.INPLACE]
    assert [(record.variant, record.status) for record in skipped] == [(cases.EAGER, "skipped")]
    made = bench.run_job(job, 2, None, available=10**9)
    assert {record.status for record in made} == {"skipped"}
    assert "GB of memory, 1.0 are free" in made[0].note


# ---- what is written -----------------------------------------------------------------------------------------------


def test_csv_holds_what_was_written(csv):
    read, environment = results.read_csv(csv)
    assert environment == ENVIRONMENT
    results.write_csv(csv.with_name("again.csv"), read, environment)
    assert csv.with_name("again.csv").read_text() == csv.read_text()


@pytest.mark.parametrize("status", ["WRONG", "failed", "skipped", "unavailable"])
def test_report(csv, status, capsys):
    read, environment = results.read_csv(csv)
    read[0] = replace(read[0], status=status, note="the reason", median=None, q1=None, q3=None)
    console = bench.Console(width=200)
    code = bench.report(read, environment, 4, csv.parent, console)
    printed = capsys.readouterr().out
    assert code == (status in ("WRONG", "failed"))
    assert f"{status}: the reason" in printed
    assert "mul_ moves 4000.0 GB/s (31250x32000-f32, 4 threads)" in printed
    assert "4 of 8 processors of A CPU, of two words with AVX2 kernels" in printed
    for name in ("results.csv", "vocabulary.png", "scaling.png"):
        assert csv.with_name(name).stat().st_size > 0


def test_plots_from_the_csv_alone(csv):
    command = [sys.executable, str(BENCHMARKS / "plots.py")]
    process = subprocess.run([*command, str(csv)], capture_output=True, text=True, check=True)
    assert [Path(line).name for line in process.stdout.split()] == ["vocabulary.png", "scaling.png"]
    csv.write_text("a,b\n1,2\n")
    process = subprocess.run([*command, str(csv)], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "is no table of results" in process.stderr


def test_readme(csv, tmp_path, capsys):
    page = tmp_path / "README.md"
    part = readme.PARTS["table"]
    page.write_text(f"# before\n\n{part.begin}\nold\n{part.end}\n\nafter\n")
    arguments = ["--part", "table", "--results", str(csv.parent), "--readme", str(page)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("# before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| 4096x32000-f32 | 10.0 | 5.00 | 2.00 | 2.00 | 2.00 | 2.00 | 5.0 / 2.5 | 5.0 / 2.5 | 10 / 2 / 2 |" in text
    assert "Measured on 4 of 8 processors of A CPU" in text
    assert "](./vocabulary.png)" in text
    assert readme.main([*arguments, "--check"]) == 0
    page.write_text("no comments")
    assert readme.main(arguments) == 2
    assert "there are no lines" in capsys.readouterr().err


def test_readme_says_what_the_results_say():
    for name, part in readme.PARTS.items():
        if (results.DEFAULT_DIRECTORY / part.csv).exists():
            assert readme.main(["--check", "--part", name]) == 0
