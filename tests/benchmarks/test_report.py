"""What is said of figures: the CSV, the tables, the targets, the pictures, README.md. The figures are made up."""

import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cases
import plots
import pytest
import readme
import report
import results
from results import Record
from rich.console import Console

pytestmark = pytest.mark.devices("cpu")

ON_CPU = {"cpu": "A CPU, of two words", "processors": "8", "isa": "AVX2", "huge_pages": "madvise", "python": "3.12.1"}
ON_CPU |= {"torch": "2.13.0", "jax": "", "commit": "abc123", "date": "2026-01-02"}
ON_GPU = {"gpu": "A GPU, of some words", "driver": "580.1", "cuda": "13.0", "python": "3.12.1", "torch": "2.11.0"}
ON_GPU |= {"liger": "0.6", "quack": "", "commit": "abc123", "date": "2026-01-02"}
COPY_RATE = 4e12  # bytes a second
# Milliseconds on the CPU; on the GPU as if each variant moved so many times the logits at the speed of the copy.
TIMES = {cases.EAGER: 10.0, cases.COMPILE: 5.0, cases.CHUNKED: 50.0}
PASSES = {cases.EAGER: 12, cases.COMPILE: 5, cases.LIGER: 3, cases.DEFAULT: 3.2, cases.PRECOMPUTE: 2.1}


def record(job: cases.Job, variant: str, what: str, value: float) -> Record:
    return Record.of(job, variant, what, "ok", median=value, q1=0.9 * value, q3=1.1 * value, n=9)


@pytest.fixture
def on_cpu() -> list[Record]:
    made = []
    for job in cases.plan(cases.CPU, threads=4):
        variants = (*job.variants, *((cases.MUL,) if job.op == cases.CROSS_ENTROPY else ()))
        made += [record(job, name, what, TIMES.get(name, 2.0)) for name in variants for what in job.whats]
    return made


@pytest.fixture
def on_gpu() -> list[Record]:
    made = []
    for job in cases.plan(cases.CUDA, (cases.LIGER,), l2_bytes=50 * cases.MIB):
        if job.op == cases.CROSS_ENTROPY:
            for name in dict.fromkeys((*job.variants, cases.COPY)):
                time = 1e3 * PASSES.get(name, 2.0) * job.case.logits_bytes / COPY_RATE
                made.append(record(job, name, cases.LOSS, time))
                made += [record(job, name, cases.MEMORY, 100.0)] if cases.MEMORY in job.whats else []
    return made


def said(records: list[Record], environment: results.Environment, capsys: pytest.CaptureFixture[str]) -> str:
    report.print_all(records, environment, Console(width=220))
    return capsys.readouterr().out


@pytest.mark.parametrize("environment", [ON_CPU, ON_GPU], ids=["cpu", "gpu"])
def test_csv_holds_what_was_written(environment, on_cpu, tmp_path):
    results.write_csv(tmp_path / "some.csv", on_cpu, environment)
    assert results.read_csv(tmp_path / "some.csv") == (on_cpu, environment)


def test_the_committed_file_is_read_and_written_alike(tmp_path):
    path = results.DEFAULT_DIRECTORY / results.CSV_NAME
    results.write_csv(tmp_path / path.name, *results.read_csv(path))
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("status", ["WRONG", "failed", "skipped", "unavailable"])
def test_report(on_cpu, status, capsys):
    on_cpu[0] = replace(on_cpu[0], status=status, note="the reason", median=None, q1=None, q3=None)
    printed = said(on_cpu, ON_CPU, capsys)
    assert f"eager: {status}: the reason" in printed
    assert "mul_ moves 4000.0 GB/s (31250x32000-f32, 4 threads)" in printed
    assert "4 of 8 processors of A CPU, of two words with AVX2 kernels" in printed
    line = next(line for line in printed.splitlines() if "2048x768x50257-f32" in line)
    figures = "10.0 5.00 50.0 2.00 2.00 2.00 5.00 2.50 25.0 10.0 5.00 50.0 2.00 2.00 2.00"
    assert line.replace("│", " ").split() == ["2048x768x50257-f32", *figures.split()]


def test_report_of_a_gpu(on_gpu, capsys):
    printed = said(on_gpu, ON_GPU, capsys)
    assert "one A GPU, of some words, driver 580.1, CUDA 13.0, torch 2.11.0" in printed
    assert "quack: quack-kernels is not installed" in printed
    assert "of 4000 GB/s" in printed
    assert "4000 (100%)" in printed
    assert "NOT MET" not in printed


def test_peers_that_are_not_installed():
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    for peer, (_, distribution) in results.GPU_PACKAGES.items():
        assert (peer in results.gpu_peers()) == (distribution in names)


# ---- bandwidths and targets ------------------------------------------------------------------------------------------


def test_bytes_are_counted():
    job = next(job for job in cases.plan(cases.CUDA) if job.case.name == "4096x32000-bf16")
    for what, variant, passes in [
        (cases.LOSS, cases.DEFAULT, 3),
        (cases.LOSS, cases.PRECOMPUTE, 2),
        (cases.LOSS, cases.INPLACE, 2),
        (cases.SCALED, cases.DEFAULT, 3),
        (cases.SCALED, cases.INPLACE, 4),
        (cases.FORWARD, cases.DEFAULT, 1),
        (cases.SOFTMAX, cases.DEFAULT, 5),
        (cases.LOSS, cases.COPY, 2),
    ]:
        rate = report.bytes_per_second(record(job, variant, what, 0.5))
        assert rate == pytest.approx(passes * 4096 * 32000 * 2 / 0.5e-3)
    assert report.bytes_per_second(record(job, cases.EAGER, cases.LOSS, 0.5)) is None
    assert report.bytes_per_second(None) is None


def test_the_copys_bandwidth(on_gpu):
    assert report.copy_bandwidth(on_gpu) == pytest.approx(COPY_RATE)
    assert report.copy_bandwidth(on_gpu[1:]) is None


def test_targets(on_gpu):
    worst = {(target.variant, target.which, target.than): target.worst(on_gpu) for target in report.TARGETS}
    assert {target.line(on_gpu)[-1] for target in report.TARGETS} == {"met"}
    assert all(count == len(report.TARGET_CASES[which]) for (_, which, _), (_, _, count) in worst.items())
    assert worst[cases.INPLACE, "C >= 32000", cases.COPY][0] == pytest.approx(1.0)
    assert worst[cases.DEFAULT, "C >= 32000", cases.COPY][0] == pytest.approx(3 / 3.2)
    assert worst[cases.INPLACE, "C >= 32000", cases.LIGER][0] == pytest.approx(1.5)


def test_the_worst_case_decides(on_gpu):
    slow = ("2048x50257-bf16", cases.INPLACE, cases.LOSS, cases.GPU_SECTION)
    worse = [
        replace(one, median=2 * one.median) if (one.case, one.variant, one.what, one.section) == slow else one
        for one in on_gpu
    ]
    missed = [target for target in report.TARGETS if target.line(worse)[-1] == "NOT MET"]
    assert {target.worst(worse)[1] for target in missed} == {"2048x50257-bf16"}
    # 12 / 4 is less than 5, and 5 / 4 less than 2.
    assert [target.than for target in missed] == [cases.COPY, cases.LIGER, cases.EAGER, cases.COMPILE]


def test_what_was_not_measured_is_not_met(on_gpu):
    line = report.TARGETS[1].line([one for one in on_gpu if one.variant != cases.LIGER])
    assert line[2:] == ["", "", f"0 of {len(report.TARGET_CASES['C >= 32000'])} cases", "not measured"]


# ---- pictures and README.md ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "environment", "linear", "names"),
    [
        ("on_cpu", ON_CPU, False, ["vocabulary.png", "scaling.png"]),
        ("on_cpu", ON_CPU, True, ["linear.png"]),
        ("on_gpu", ON_GPU, False, ["gpu.png"]),
    ],
)
def test_pictures(fixture, environment, linear, names, request, tmp_path):
    records = [one for one in request.getfixturevalue(fixture) if report.of_linear(one) == linear]
    results.write_csv(tmp_path / "some.csv", records, environment)
    assert [path.name for path in plots.draw(tmp_path / "some.csv")] == names
    assert all((tmp_path / name).stat().st_size > 0 for name in names)
    few = [one for one in records if one.section in (cases.TABLE_SECTION, cases.GPU_SECTION, cases.LINEAR_SECTION)]
    results.write_csv(tmp_path / "some.csv", few, environment)
    assert plots.draw(tmp_path / "some.csv") == []


def test_what_is_no_table_of_results(tmp_path):
    (tmp_path / "some.csv").write_text("a,b\n1,2\n")
    command = [sys.executable, plots.__file__, str(tmp_path / "some.csv")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "is no table of results" in process.stderr


def test_readme(on_cpu, tmp_path, capsys, monkeypatch):
    page = tmp_path / "README.md"
    parts = readme.PARTS.values()
    page.write_text("# before\n" + "".join(f"\n{part.begin}\nold\n{part.end}\n" for part in parts) + "\nafter\n")
    monkeypatch.setattr(readme, "PAGE", page)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    for part in parts:
        results.write_csv(
            tmp_path / part.csv, [one for one in on_cpu if report.of_linear(one) == (part.csv == "linear.csv")], ON_CPU
        )
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == 0
    text = page.read_text()
    assert text.startswith("# before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| 4096x32000-f32 | 10.0 | 5.00 | 2.00 | 2.00 | 2.00 | 5.0 / 2.5 | 5.0 / 2.5 | 10 / 2 / 2 |" in text
    for dtype, wide, of_wide in (("f32", "-", "-"), ("bf16", "2.00", "2")):
        times, memory = f"10.0 | 5.00 | 50.0 | 2.00 | 2.00 | 2.00 | {wide}", f"10 / 5 / 50 / 2 / 2 / 2 / {of_wide}"
        assert f"| 2048x768x50257-{dtype} | {times} | 5.00 / 2.50 / 25.00 | {memory} |" in text
    assert "Measured on 4 of 8 processors of A CPU" in text
    assert "](./vocabulary.png)" in text
    assert readme.main(["--check"]) == 0
    page.write_text("no comments")
    assert readme.main([]) == 2
    assert "there are no lines" in capsys.readouterr().err


def test_readme_says_what_the_results_say():
    assert Path(readme.PAGE).exists()
    assert readme.main(["--check"]) == 0
