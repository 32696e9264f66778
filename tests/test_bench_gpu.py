"""The benchmark on a GPU, as far as it goes without one: the plan, the check of the answers, the counts, the report."""

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import answers
import bench
import bench_gpu
import cases
import gpu_cases
import gpu_report
import gpu_worker
import numpy as np
import plots
import pytest
import results
import torch
import torch.nn.functional as F
import worker
from cases import Case
from measure import MIB, Summary

TINY = [Case("rows", (6, 5)), Case("bf16", (6, 300), "bfloat16"), Case("strided", (2, 5, 3, 2))]
L2 = 50 * MIB
ENVIRONMENT = results.GpuEnvironment(
    gpu="A GPU, of some words",
    memory_gib=139.8,
    driver="580.1",
    cuda="13.0",
    architectures="90",
    python="3.12.1",
    torch="2.11.0",
    softmax_ext="0.1.0",
    triton="3.6",
    liger="0.6",
    quack="",
    commit="abc123",
    date="2026-01-02",
)
COPY_RATE = 4e12  # bytes a second, in the figures made up below
pytestmark = pytest.mark.devices("cpu")


def seconds(case: Case, passes: float) -> float:
    return passes * case.logits_bytes / COPY_RATE


def record(job: gpu_cases.GpuJob, variant: str, what: str, value: float) -> results.Record:
    return results.Record.of(job, variant, what, "ok", median=value, q1=0.9 * value, q3=1.1 * value, n=30)


@pytest.fixture
def records() -> list[results.Record]:
    """As if each variant moved so many times the logits at the speed of the copy."""
    passes = {cases.EAGER: 12, cases.COMPILE: 5, cases.LIGER: 3, cases.DEFAULT: 3.2, cases.PRECOMPUTE: 2.1}
    made = []
    for job in gpu_cases.plan((cases.LIGER,), L2):
        for variant in dict.fromkeys((*job.variants, cases.COPY)):
            times = 1e3 * seconds(job.case, passes.get(variant, 2.0))
            made.append(record(job, variant, cases.LOSS, times))
            if cases.MEMORY in job.whats:
                made.append(record(job, variant, cases.MEMORY, 100.0))
    return made


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "0"], "1 or more; got '0'"),
        (["--seconds", "soon"], "1 or more; got 'soon'"),
        (["--only", "3x4"], "knows no case '3x4'; there are: 8192x128256-bf16"),
        (["--output", __file__], "needs a directory"),
        (["--quick", "--only", "1000000x10-f32"], "goes with neither"),
        (["--fast"], "unrecognized"),
    ],
)
def test_bad_arguments_get_a_message(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_gpu.main(arguments)
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    """One sentence, and a status that says that nothing was tried."""
    script = Path(bench_gpu.__file__)
    process = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("bench_gpu.py: there is no GPU")
    assert len(process.stderr.splitlines()) == 1


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("softmax_ext.cuda.library", None)
    monkeypatch.setattr("softmax_ext.cuda.missing", "softmax_ext was built without CUDA")
    assert bench_gpu.reason_not_to() == "softmax_ext was built without CUDA."


def test_options_of_a_full_run():
    assert bench_gpu.parse([]).output == results.DEFAULT_DIRECTORY
    assert bench_gpu.parse(["--only", "1000000x10-f32"]).output is None
    assert bench_gpu.parse(["--quick"]).samples < bench_gpu.parse([]).samples


# ---- everything in one command ---------------------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
echo "$*" >>"$STUB_LOG"
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *build_ext*) exit "$STUB_BUILD" ;;
  *"pytest --device cuda"*) exit "$STUB_TESTS" ;;
  *"import hypothesis"*) exit 1 ;;
esac
"""


def gpu_run(tmp_path: Path, *arguments: str, build: int = 0, tests: int = 0) -> tuple[int, str, list[str]]:
    """Its exit status, what it printed, and what the interpreter was asked for, by a stub of one."""
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "STUB_LOG": str(log)}
    environment |= {"STUB_BUILD": str(build), "STUB_TESTS": str(tests)}
    script = Path(bench_gpu.__file__).with_name("gpu_run.sh")
    command = [str(script), *(arguments or [str(tmp_path / "results")])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(("tests", "status"), [(0, 0), (1, 1)])
def test_gpu_run(tests, status, tmp_path):
    """Failing tests are said, and the benchmark runs all the same."""
    code, printed, asked = gpu_run(tmp_path, tests=tests)
    assert code == status
    steps = [line for line in asked if not line.startswith(("-c", "-m softmax_ext"))]
    assert steps[0] == "setup.py build_ext --inplace"
    assert all(part in line for part, line in zip(["test_cuda.py", "--ignore", "sanitize"], steps[1:], strict=False))
    assert steps[-2].startswith(f"benchmarks/bench_gpu.py --output {tmp_path}/results --seconds ")
    assert steps[-1].startswith(f"benchmarks/bench_linear.py --gpu --output {tmp_path}/results --seconds ")
    assert "--ignore=tests/unit/test_softmax.py" in steps[2]
    assert "skipped: no hypothesis" in printed
    assert ("FAILED with status 1, gpu_tests.log" in printed) == bool(tests)
    assert printed.splitlines()[-1].startswith("in all")
    logs = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert logs == ["gpu_bench.log", "gpu_build.log", "gpu_sanitizer.log", "gpu_tests.log"]


def test_gpu_run_without_a_build(tmp_path):
    code, printed, asked = gpu_run(tmp_path, build=1)
    assert code == 2
    assert "FAILED with status 1, gpu_build.log" in printed
    assert asked[-1] == "setup.py build_ext --inplace"


@pytest.mark.parametrize("arguments", [["--help"], ["a", "b"]])
def test_gpu_run_says_how_it_is_called(arguments, tmp_path):
    assert gpu_run(tmp_path, *arguments) == (2, "usage: benchmarks/gpu_run.sh [DIRECTORY]\n", [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_without_a_gpu(tmp_path):
    script = Path(bench_gpu.__file__).with_name("gpu_run.sh")
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no torch that can use a GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_plan():
    jobs = gpu_cases.plan((cases.LIGER, cases.QUACK), L2)
    assert (jobs[0].section, jobs[0].variants) == (gpu_cases.COPY_SECTION, (cases.COPY,))
    table = {job.case: job for job in jobs if job.section == gpu_cases.SECTION}
    assert set(table) == set(gpu_cases.TABLE)
    assert {case.dtype for case in table} == {"bfloat16", "float32"}
    for job in table.values():
        assert set(job.variants) == {cases.EAGER, cases.COMPILE, *cases.GPU_PEERS, *cases.OURS}
        assert job.whats == (cases.LOSS, cases.SCALED, cases.FORWARD, cases.MEMORY)
    pictured = {job.case for job in jobs if job.section != gpu_cases.COPY_SECTION}
    assert pictured >= set(gpu_cases.VOCABULARY)
    only = gpu_cases.plan((), L2, ["1000000x10-f32"])
    assert [job.case.name for job in only] == [gpu_cases.LARGE_COPY.name, "1000000x10-f32"]
    assert gpu_cases.QUICK


@pytest.mark.parametrize("case", gpu_cases.TABLE, ids=lambda case: case.name)
def test_the_inputs_do_not_stay_in_cache(case):
    count = gpu_cases.buffers(case, L2)
    assert count * case.logits_bytes >= gpu_cases.L2_SIZES * L2
    assert (count - 1) * case.logits_bytes < gpu_cases.L2_SIZES * L2


def test_what_does_not_fit_is_skipped():
    job = gpu_cases.plan((), L2, ["16384x262144-f32"])[1]
    inputs = 2 * job.case.logits_bytes
    available = inputs + int(1.5 * job.case.logits_bytes)
    fitting, skipped = bench.split_by_memory(job, available)
    assert fitting == list(cases.OURS)
    assert {record.variant for record in skipped} == {cases.EAGER, cases.COMPILE}
    assert all("GB of memory" in record.note for record in skipped)


def test_what_comes_too_late_is_skipped():
    jobs = gpu_cases.plan((), L2, ["1000000x10-f32"])
    console = bench_gpu.Console(width=200)
    made = bench.run_jobs(jobs, 1, None, console, lambda: 0, seconds=-1)
    assert {record.status for record in made} == {"skipped"}
    assert all("were over" in record.note for record in made)


# ---- correctness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("what", [cases.LOSS, cases.SCALED, cases.FORWARD])
def test_answers_are_those_of_torch_in_float64(case, what):
    workload = gpu_worker.GpuWorkload(case, copies=2, device="cpu")
    expected = workload.expect(what, answers.checked_rows(case))
    x = workload.logits[0].double().requires_grad_()
    loss = F.cross_entropy(x, workload.target) * (0.5 if what == cases.SCALED else 1)
    np.testing.assert_allclose(loss.item(), expected.value[0, 0], rtol=1e-12)
    if what == cases.FORWARD:
        assert expected.gradient is None
        return
    loss.backward()
    gradient = answers.as_rows(x.grad.numpy(), 1)
    np.testing.assert_allclose(gradient, expected.gradient, rtol=1e-9, atol=1e-15)


def right_variants(case: Case, what: str) -> dict[str, str]:
    """By variant, what a worker says of it before it measures; on the CPU."""
    workload = gpu_worker.GpuWorkload(case, copies=2, device="cpu")
    rows = answers.checked_rows(case)
    known = workload.variants(what)
    chosen = {name: known[name] for name in known if name not in (cases.COMPILE, *cases.GPU_PEERS)}
    lines: list[dict] = []
    expected = workload.expect(what, rows)
    right = worker.right_ones(what, chosen, expected, lambda result: workload.fetch(result, rows), lines.append)
    return {**dict.fromkeys(right, "ok"), **{line["variant"]: line["status"] for line in lines}}


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_variant_is_right(case):
    ours = dict.fromkeys([cases.EAGER, *cases.OURS, cases.COPY], "ok")
    assert right_variants(case, cases.LOSS) == ours
    assert right_variants(case, cases.SCALED) == ours
    assert right_variants(case, cases.FORWARD) == dict.fromkeys([cases.EAGER, cases.DEFAULT, cases.SUM], "ok")


def test_a_wrong_result_is_noticed(monkeypatch):
    import softmax_ext

    monkeypatch.setattr(softmax_ext, "cross_entropy", lambda x, y, **strategy: 1.001 * F.cross_entropy(x, y))
    said = right_variants(TINY[0], cases.LOSS)
    assert said[cases.EAGER] == "ok"
    assert said[cases.DEFAULT] == "WRONG"


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_overwritten_inputs_are_copied_anew(case):
    """Each call of a round has the logits, not the gradient of the round before."""
    workload = gpu_worker.GpuWorkload(case, copies=2, device="cpu")
    prepare = workload.variants(cases.LOSS)[cases.INPLACE]
    rounds = []
    for _ in range(2):
        call = prepare(2)
        rounds.append([call()[0].item() for _ in range(2)])
    assert rounds[0] == rounds[1]
    assert rounds[0][0] != rounds[0][1]  # other logits


def test_peers_take_rows_alone():
    for case, there in [(TINY[0], True), (TINY[2], False)]:
        workload = gpu_worker.GpuWorkload(case, copies=1, device="cpu")
        assert all((peer in workload.variants(cases.LOSS)) == there for peer in cases.GPU_PEERS)


@pytest.mark.parametrize(
    ("error", "name", "status"),
    [
        (ImportError("no module"), cases.LIGER, "unavailable"),
        (RuntimeError("no compiler"), cases.COMPILE, "unavailable"),
        (RuntimeError("illegal memory access"), cases.DEFAULT, "failed"),
        (torch.OutOfMemoryError("of 3 GiB"), cases.EAGER, "skipped"),
    ],
)
def test_what_raises_is_reported(error, name, status):
    def raising() -> None:
        raise error

    lines: list[dict] = []
    assert worker.attempt(cases.LOSS, name, raising, lines.append) is None
    assert [line["status"] for line in lines] == [status]


# ---- measuring -------------------------------------------------------------------------------------------------------


class ClockOfTurns:
    """Counts instead of timing."""

    def __init__(self):
        self.turns = []

    def round(self, prepare, calls, head_start_ms):
        call = prepare(calls)
        for _ in range(calls):
            self.turns.append(call())
        return [float(len(self.turns))] * calls, 2.0


def test_variants_take_turns():
    clock = ClockOfTurns()
    variants = {name: (lambda calls, name=name: lambda: name) for name in "ab"}
    measured = gpu_worker.times_ms(clock, variants, calls=3, samples=7)
    assert {name: summary.n for name, summary in measured.items()} == {"a": 9, "b": 9}
    assert "".join(clock.turns) == "aaabbb" * (3 + 3)  # untimed rounds, timed ones


class CpuClock:
    """Times on the CPU."""

    def round(self, prepare, calls, head_start_ms):
        call = prepare(calls)
        for _ in range(calls):
            call()
        return [1.0 + i for i in range(calls)], 1.0


def test_a_job(monkeypatch):
    """All that a process does, with the CPU in the place of the GPU."""
    cuda = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=20),
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 0,
        max_memory_allocated=lambda: 3 * MIB,
    )
    monkeypatch.setattr(gpu_worker.torch, "cuda", cuda)
    monkeypatch.setattr(gpu_worker, "Clock", CpuClock)
    monkeypatch.setattr(gpu_worker, "GpuWorkload", partial(gpu_worker.GpuWorkload, device="cpu"))
    whats = [cases.LOSS, cases.SCALED, cases.FORWARD, cases.MEMORY]
    variants = [cases.EAGER, cases.LIGER, *cases.OURS, cases.COPY, cases.SUM]
    lines: list[dict] = []
    gpu_worker.work(worker.Request(TINY[0], variants, whats, repeats=4, threads=1), lines.append)
    said = {(line["what"], line["variant"]): line for line in lines}
    assert len(said) == len(lines)
    mine = [cases.EAGER, *cases.OURS]
    for what in (cases.LOSS, cases.SCALED):
        assert all(said[what, variant]["status"] == "ok" for variant in (*mine, cases.COPY))
        assert said[what, cases.EAGER]["n"] == 4
    assert all(said[cases.FORWARD, variant]["status"] == "ok" for variant in (cases.EAGER, cases.DEFAULT, cases.SUM))
    assert all(said[cases.MEMORY, variant]["median"] == 3 for variant in mine)
    assert said[cases.LOSS, cases.LIGER]["status"] == "unavailable"


@pytest.mark.parametrize(("arguments", "written"), [([], True), (["--quick"], False)])
def test_the_command(arguments, written, monkeypatch, tmp_path, capsys):
    def run_job(job, samples, peer_python, available):
        assert job.script == "gpu_worker.py"
        return [record(job, variant, what, 2.0) for variant in (*job.variants, cases.COPY) for what in job.whats]

    monkeypatch.setattr(bench, "run_job", run_job)
    monkeypatch.setattr(bench_gpu, "reason_not_to", lambda: None)
    monkeypatch.setattr(bench_gpu, "_l2_bytes", lambda: L2)
    monkeypatch.setattr(bench_gpu, "free_bytes", lambda: 2**37)
    monkeypatch.setattr(bench_gpu, "describe_gpu", lambda: ENVIRONMENT)
    monkeypatch.setattr(bench_gpu, "DEFAULT_DIRECTORY", tmp_path)
    assert bench_gpu.main(arguments) == 0
    assert (tmp_path / "gpu.csv").exists() == (tmp_path / "gpu.png").exists() == written
    assert "GB/s by the bytes" in capsys.readouterr().out


# ---- what is said of the figures -------------------------------------------------------------------------------------


def test_bytes_are_counted():
    job = gpu_cases.plan((), L2, ["4096x32000-bf16"])[1]
    logits = 4096 * 32000 * 2
    for what, variant, passes in [
        (cases.LOSS, cases.DEFAULT, 3),
        (cases.LOSS, cases.PRECOMPUTE, 2),
        (cases.LOSS, cases.INPLACE, 2),
        (cases.SCALED, cases.DEFAULT, 3),
        (cases.SCALED, cases.INPLACE, 4),
        (cases.FORWARD, cases.DEFAULT, 1),
        (cases.LOSS, cases.COPY, 2),
    ]:
        rate = gpu_report.bytes_per_second(record(job, variant, what, 0.5))
        assert rate == pytest.approx(passes * logits / 0.5e-3)
    assert gpu_report.bytes_per_second(record(job, cases.EAGER, cases.LOSS, 0.5)) is None
    assert gpu_report.bytes_per_second(None) is None


def test_the_copys_bandwidth(records):
    assert gpu_report.copy_bandwidth(records) == pytest.approx(COPY_RATE)
    assert gpu_report.copy_bandwidth(records[1:]) is None


def test_targets(records):
    verdicts = {target.text: gpu_report.judge(target, records) for target in gpu_report.TARGETS}
    assert {verdict.said for verdict in verdicts.values()} == {"met"}
    assert all(verdict.measured == len(verdict.target.cases) for verdict in verdicts.values())
    share = verdicts["in place, C >= 32000: share of the copy's bandwidth"]
    assert share.worst == pytest.approx(1.0)
    assert verdicts["default, C >= 32000: share of the copy's bandwidth"].worst == pytest.approx(3 / 3.2)
    assert verdicts["in place, C >= 32000: times as fast as Liger-Kernel"].worst == pytest.approx(1.5)


def test_the_worst_case_decides(records):
    slow = ("2048x50257-bf16", cases.INPLACE, cases.LOSS)
    worse = [
        replace(r, median=2 * r.median) if (r.case, r.variant, r.what) == slow and r.section == "gpu" else r
        for r in records
    ]
    verdicts = [gpu_report.judge(target, worse) for target in gpu_report.TARGETS]
    missed = [verdict for verdict in verdicts if verdict.said == "NOT MET"]
    assert {verdict.worst_case for verdict in missed} == {"2048x50257-bf16"}
    assert [verdict.target.text.split(": ")[1] for verdict in missed] == [
        "share of the copy's bandwidth",
        "times as fast as Liger-Kernel",
        # 12 / 4 is less than 5, and 5 / 4 less than 2
        "times as fast as eager",
        "times as fast as torch.compile",
    ]


def test_what_was_not_measured_is_not_met(records):
    without = [r for r in records if r.variant != cases.LIGER]
    verdict = gpu_report.judge(gpu_report.TARGETS[1], without)
    assert (verdict.said, verdict.measured, verdict.worst) == ("not measured", 0, None)


def test_report(records, tmp_path, capsys):
    console = bench_gpu.Console(width=220)
    assert bench_gpu.report(records, ENVIRONMENT, tmp_path, console) == 0
    printed = capsys.readouterr().out
    assert "one A GPU, of some words, driver 580.1, CUDA 13.0, torch 2.11.0" in printed
    assert "quack: quack-kernels is not installed" in printed
    assert "of 4000 GB/s" in printed
    assert "4000 (100%)" in printed
    assert "NOT MET" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.csv", "gpu.png"]


@pytest.mark.parametrize(("variant", "status"), [(cases.DEFAULT, 1), (cases.LIGER, 0)])
def test_only_our_own_errors_are_errors(records, variant, status, capsys):
    at = next(i for i, r in enumerate(records) if r.variant == variant)
    records[at] = replace(records[at], status="WRONG", note="off", median=None, q1=None, q3=None)
    assert bench_gpu.report(records, ENVIRONMENT, None, bench_gpu.Console(width=220)) == status
    assert "WRONG: off" in capsys.readouterr().out


def test_csv_holds_what_was_written(records, tmp_path):
    path = tmp_path / bench_gpu.CSV_NAME
    results.write_csv(path, records, ENVIRONMENT)
    assert results.read_csv(path) == (records, ENVIRONMENT)


def test_picture_without_the_other_vocabularies(records, tmp_path):
    path = tmp_path / bench_gpu.CSV_NAME
    results.write_csv(path, [r for r in records if r.section != gpu_cases.VOCABULARY_SECTION], ENVIRONMENT)
    assert plots.draw(path) == []


def test_peers_that_are_not_installed():
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    for peer, (_, distribution) in bench_gpu._PEER_PACKAGES.items():
        assert (peer in bench_gpu.peers_here()) == (distribution in names)


def test_summary_of_one_sample():
    assert Summary.of([3.0]) == Summary(3.0, 3.0, 3.0, 1)
