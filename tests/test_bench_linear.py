"""The benchmark of linear cross entropy, as far as it goes without waiting for it."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import bench_linear
import linear_cases
import linear_worker
import measure
import plots
import pytest
import readme
import results
from cases import COMPILE, DEFAULT, EAGER, LOSS, MEMORY
from linear_cases import CHUNKED, LinearCase, LinearJob
from results import Environment, Record

pytestmark = pytest.mark.devices("cpu")

BENCHMARKS = Path(bench_linear.__file__).parent
SMALL = LinearCase(40, 16, 100)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variants_are_right_and_a_wrong_one_is_found(dtype):
    workload = linear_worker.LinearWorkload(LinearCase(300, 16, 100, dtype))
    variants = workload.variants()
    for name in {EAGER, CHUNKED, DEFAULT} & set(variants):
        assert workload.complaint(variants[name](1)()) == ""
    loss, of_rows, of_classes = variants[DEFAULT](1)()
    assert "loss: relative error" in workload.complaint((1.05 * loss, of_rows, of_classes))
    assert "gradient of the input" in workload.complaint((loss, 0.9 * of_rows, of_classes))
    assert "gradient of the weight" in workload.complaint((loss, of_rows, 0.9 * of_classes))


def test_plan():
    on_cpu, on_gpu = linear_cases.plan(2), linear_cases.plan(1, gpu=True)
    assert {job.case.name for job in (*on_cpu, *on_gpu)} == set(linear_cases.CASES)
    for jobs, variants in ((on_cpu, linear_cases.VARIANTS), (on_gpu, linear_cases.GPU_VARIANTS)):
        for case in {job.case for job in jobs}:
            mine = [(job.variants, job.whats) for job in jobs if job.case == case]
            assert mine == [(variants, (LOSS,)), *(((variant,), (MEMORY,)) for variant in variants)]
    assert {job.case.device for job in on_cpu} == {"cpu"}
    assert {job.case.device for job in on_gpu} == {"cuda"}
    assert linear_cases.TABLE[0].logits_bytes == 2048 * 50257 * 4
    assert linear_cases.TABLE[1].gradient_bytes == (2048 + 50257) * 768 * 2


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(bench_linear, "reason_not_to", lambda: "there is no GPU.")
    assert bench_linear.main(["--gpu"]) == 2
    assert capsys.readouterr().err == "bench_linear.py: there is no GPU.\n"


def test_a_wrong_argument_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_linear.main(["--only", "1x2x3"])
    assert stopped.value.code == 2
    assert "knows no case '1x2x3'" in capsys.readouterr().err


def _record(job: LinearJob, variant: str, what: str, median: float) -> Record:
    return Record.of(job, variant, what, "ok", median=median, q1=median, q3=median, n=5)


@pytest.fixture
def records() -> list[Record]:
    times = {EAGER: 30.0, COMPILE: 20.0, CHUNKED: 50.0, DEFAULT: 10.0}
    made = []
    for job in linear_cases.plan(2):
        for variant in job.variants:
            made += [_record(job, variant, what, times[variant]) for what in job.whats]
    return made


def test_what_is_written(records, tmp_path, monkeypatch, capsys):
    values = {name: 8 if name == "processors" else f"a {name}" for name in Environment.__dataclass_fields__}
    environment = Environment(**values)
    monkeypatch.setattr(bench_linear, "run_jobs", lambda *_: records)
    monkeypatch.setattr(bench_linear, "describe_environment", lambda _: environment)
    assert bench_linear.main(["--output", str(tmp_path)]) == 0
    assert "3.00" in capsys.readouterr().out
    assert results.read_csv(tmp_path / "linear.csv") == (records, environment)
    assert (tmp_path / "linear.png").stat().st_size > 0
    assert [path.name for path in plots.draw(tmp_path / "linear.csv")] == ["linear.png"]
    block = readme.linear_block(records, environment, "results")
    assert "| 2048x768x50257-f32 | 30.0 | 20.0 | 50.0 | 10.0 | 3.00 / 2.00 / 5.00 | 30 / 20 / 50 / 10 |" in block


def test_a_job_in_its_process():
    request = {**asdict(LinearJob("linear", SMALL, (EAGER, DEFAULT), (LOSS,), 1)), "repeats": 2}
    command = [sys.executable, str(BENCHMARKS / "linear_worker.py")]
    for what in (LOSS, MEMORY):
        line = json.dumps(request | {"whats": [what]})
        process = subprocess.run([*command, line], capture_output=True, text=True, check=True)
        assert process.stdout.count('"status": "ok"') == 2
        assert process.stdout.count(f'"what": "{what}"') == 2


def test_what_takes_seconds_is_called_less_often(monkeypatch):
    called = {"slow": 0, "slower": 0, "quick": 0}
    seconds = {"slow": 3.0, "slower": 30.0, "quick": 0.001}
    monkeypatch.setattr(measure, "_seconds", lambda prepare, calls: prepare(calls))

    def variant(name: str) -> object:
        def prepare(calls: int) -> float:
            called[name] += 1
            return seconds[name]

        return prepare

    summaries = measure.times_ms({name: variant(name) for name in called}, 5)
    assert {name: summary.n for name, summary in summaries.items()} == {"slow": 5, "slower": 1, "quick": 5}
    assert called == {"slow": 5, "slower": 1, "quick": 1 + measure.UNTIMED_ROUNDS + 2 * 5}


KEPT_GRADIENT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import measure, softmax_ext
logits = torch.randn(1009, 10007, requires_grad=True)
target = torch.zeros(1009, dtype=torch.long)
def step():
    softmax_ext.cross_entropy(logits, target).backward()
    logits.grad = None
print(measure.extra_memory_mib(lambda calls: step, False).median)
"""


def test_kept_memory_counts_when_it_is_used():
    """The gradient of a step lies where that of the step before lay; it is memory that the step adds all the same."""
    command = [sys.executable, "-c", KEPT_GRADIENT, str(BENCHMARKS)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 38 <= float(printed) <= 60
