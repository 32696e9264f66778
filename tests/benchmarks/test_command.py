"""benchmarks/bench.py: what it refuses, what it plans, how it runs its processes, what it writes."""

import subprocess
import sys
from pathlib import Path

import bench
import cases
import pytest
import results
import torch
from cases import Case, Job

pytestmark = pytest.mark.devices("cpu")

BENCHMARKS = Path(bench.__file__).parent
L2 = 50 * cases.MIB
TINY = Case("rows", (6, 5))
GPU = {**dict.fromkeys(("gpu", "driver", "cuda", "torch", "python", "commit", "date", "liger", "quack"), "a word")}
CPU = dict.fromkeys(("processors", "cpu", "isa", "torch", "python", "huge_pages", "commit", "date"), "a word")


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "1 or more; got '0'"),
        (["--seconds", "soon"], "1 or more; got 'soon'"),
        (["--threads", "100000"], "processors"),
        (["--only", "3x4"], "knows no case '3x4'; there are: 1024x128256-f32"),
        (["--device", "cuda", "--only", "8x10-f32"], "knows no case '8x10-f32'; there are: 2 GiB, 8192x128256-bf16"),
        (["--op", "linear", "--only", "8x10-f32"], "there are: 2048x768x50257-f32"),
        (["--op", "matmul"], "invalid choice: 'matmul'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--peers", "/no/such/python"], "cannot be run"),
        (["--peers", sys.executable], "neither JAX with optax nor TensorFlow"),
        (["--device", "cuda", "--threads", "1"], "are for --device cpu"),
        (["--output", __file__], "needs a directory"),
        (["--quick", "--only", "8x10-f32"], "goes with none of"),
        (["--quick", "--op", "linear"], "goes with none of"),
        (["--fast"], "unrecognized"),
    ],
)
def test_bad_arguments_get_a_message(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(bench, "peer_versions", lambda python: {})
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    """The command itself: one sentence, and a status that says that nothing was tried."""
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--device", "cuda"]
    root = str(BENCHMARKS.parent)
    process = subprocess.run(command, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("bench.py: there is no GPU")
    assert len(process.stderr.splitlines()) == 1


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("softmax_ext.cuda.library", None)
    monkeypatch.setattr("softmax_ext.cuda.missing", "softmax_ext was built without CUDA")
    with pytest.raises(RuntimeError, match=r"softmax_ext was built without CUDA\."):
        results.describe_gpu()


# ---- plans -----------------------------------------------------------------------------------------------------------


def of(jobs: list[Job], case: Case, section: str) -> dict[str, set[str]]:
    """By what, the variants that it is measured of."""
    found: dict[str, set[str]] = {}
    for job in jobs:
        if (job.case, job.section) == (case, section):
            for what in job.whats:
                found[what] = found.get(what, set()) | set(job.variants)
    return found


def test_plan_of_the_cpu():
    """Every case is timed and has its memory measured by all variants, memory and peers in processes of their own."""
    jobs = cases.plan(cases.CPU, (cases.JAX,), threads=2)
    for case in cases.TABLE:
        found = of(jobs, case, cases.TABLE_SECTION)
        assert found[cases.LOSS] == found[cases.MEMORY] == {cases.EAGER, cases.COMPILE, *cases.OURS, cases.JAX}
        assert (cases.SOFTMAX in found) == case.plain
    for case in (*cases.LINEAR_TABLE[cases.CPU], *cases.LINEAR_VOCABULARY[cases.CPU]):
        mine = [job for job in jobs if job.case == case]
        assert {job.whats for job in mine if len(job.variants) > 1} == {(cases.LOSS,)}
        expected = {*cases.LINEAR_VARIANTS[cases.CPU]} - ({cases.WIDE} if case.dtype == "float32" else set())
        assert {job.variants[0] for job in mine if job.whats == (cases.MEMORY,)} == expected
    assert all(job.variants == (cases.JAX,) for job in jobs if cases.JAX in job.variants)
    assert all(len(job.variants) == 1 for job in jobs if cases.MEMORY in job.whats)
    assert [job.threads for job in jobs if job.section == "one thread"] == [1] * len(cases.THREADS)
    assert not [job for job in cases.plan(cases.CPU, threads=1) if job.section == "one thread"]
    assert [job for job in jobs if job.thp]
    assert {job.worker for job in jobs} == {f"workers.{name}_worker" for name in ("torch", "linear", "jax")}


def test_plan_of_a_gpu():
    jobs = cases.plan(cases.CUDA, (cases.LIGER, cases.QUACK), l2_bytes=L2)
    assert (jobs[0].section, jobs[0].variants) == (cases.COPY_SECTION, (cases.COPY,))
    for case in cases.GPU_TABLE:
        found = of(jobs, case, cases.GPU_SECTION)
        assert found[cases.LOSS] == found[cases.SCALED] == found[cases.FORWARD] == found[cases.MEMORY]
        assert found[cases.LOSS] == {cases.EAGER, cases.COMPILE, cases.LIGER, cases.QUACK, *cases.OURS}
        assert found[cases.SOFTMAX] == found[cases.LOG_SOFTMAX] == {cases.EAGER, cases.DEFAULT}
    for case in cases.LINEAR_TABLE[cases.CUDA]:
        both = {*cases.LINEAR_VARIANTS[cases.CUDA]}
        assert of(jobs, case, cases.LINEAR_SECTION) == {cases.LOSS: both, cases.MEMORY: both}
    assert {job.case for job in jobs} >= {*cases.GPU_VOCABULARY, *cases.LINEAR_VOCABULARY[cases.CUDA]}
    assert [job.worker for job in jobs] == sorted((job.worker for job in jobs), reverse=True)  # two processes in all
    assert cases.plan_quick(cases.CUDA)[1:]
    for job in jobs:  # the inputs do not stay in cache
        if job.op != cases.LINEAR:
            size = job.case.logits_bytes
            assert (job.copies - 1) * size < cases.L2_SIZES * L2 <= job.copies * size


def test_one_name_is_one_case():
    for device in (cases.CPU, cases.CUDA):
        found = {job.case for job in cases.plan(device)}
        assert len({case.name for case in found}) == len(found)
    case = cases.LINEAR_TABLE[cases.CPU][1]
    assert (case.logits_bytes, case.gradient_bytes) == (2048 * 50257 * 2, (2048 + 50257) * 768 * 2)


@pytest.mark.parametrize("device", [cases.CPU, cases.CUDA])
def test_operators_and_cases_are_chosen(device, monkeypatch):
    monkeypatch.setattr(bench, "gpu_l2_bytes", lambda: L2)
    shared = "4096x32000-f32"
    for arguments, ops in [([], set(cases.OPS)), (["--op", "linear", "softmax"], {"linear", "softmax"})]:
        options = bench.parse(["--device", device, *arguments])
        options.threads = 2
        assert {job.op for job in bench.jobs_of(options, {})} == ops
    options = bench.parse(["--device", device, "--only", shared, "--op", "cross_entropy"])
    options.threads = 2
    names = {job.case.name for job in bench.jobs_of(options, {})}
    assert names == {shared} | ({cases.LARGE_COPY.name} if device == cases.CUDA else set())


# ---- processes -------------------------------------------------------------------------------------------------------


def job_of(*variants: str, whats: tuple[str, ...] = (cases.LOSS,), device: str = cases.CPU, case: Case = TINY) -> Job:
    return Job("table", cases.CROSS_ENTROPY, case, variants, whats, device)


def test_a_job_in_its_process():
    made = bench.Bench(repeats=2).do(job_of(cases.EAGER, cases.INPLACE))
    assert {record.variant: record.status for record in made} == dict.fromkeys(
        [cases.EAGER, cases.INPLACE, cases.MUL], "ok"
    )
    assert all(record.unit == "ms" and record.median > 0 and record.n == 2 for record in made)


LINE = {"what": cases.LOSS, "variant": cases.EAGER, "status": "ok", "note": "", "median": 1, "q1": 1, "q3": 1, "n": 2}
# A worker that says its process id and what it is asked for, and dies of a case that is named so.
STUB = f"""
import json, os, sys
line = {LINE}
for text in sys.stdin:
    request = json.loads(text)
    print("not for the benchmark")
    print(json.dumps(line | {{"note": str(os.getpid())}}), flush=True)
    if request["case"]["name"] == "dies":
        os.kill(os.getpid(), 9)
    if request["case"]["name"] == "spoils":
        raise RuntimeError("the context is spoiled")
    if request["case"]["name"] == "hangs":
        sys.stdin.read()
    print("{{}}", flush=True)
"""


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(bench, "command_of", lambda job, python: [sys.executable, "-c", STUB])
    monkeypatch.setattr(bench, "gpu_bytes", lambda: 2**40)


def test_a_process_that_dies_is_reported(stub):
    """With what it said before."""
    job = job_of(cases.EAGER, whats=(cases.LOSS, cases.SOFTMAX), case=Case("dies", (6, 5)))
    loss, softmax = bench.Bench().do(job)
    assert (loss.what, loss.status) == (cases.LOSS, "ok")
    assert (softmax.what, softmax.status) == (cases.SOFTMAX, "failed")
    assert softmax.note == "killed by signal 9 (out of memory?)"


def test_a_process_that_hangs_is_ended(stub):
    worker = bench.Worker(bench.command_of(job_of(), None), {})
    said, reason = worker.ask({"case": {"name": "hangs"}}, seconds=1)
    assert ([line["variant"] for line in said], reason) == ([cases.EAGER], "took more than 1 s")
    worker.close()


def test_on_a_gpu_cases_share_a_process_until_one_spoils_it(stub):
    def pids(device: str, names: list[str]) -> list[str]:
        one = bench.Bench()
        jobs = [job_of(cases.EAGER, device=device, case=Case(name, (6, 5))) for name in names]
        made = [one.do(job) for job in jobs]
        one.close()
        assert [[record.status for record in records] for records in made] == [["ok"]] * len(names)
        return [records[0].note for records in made]

    first, spoiling, third, fourth = pids(cases.CUDA, ["a", "spoils", "c", "d"])
    assert first == spoiling != third == fourth
    assert len(set(pids(cases.CPU, ["a", "b"]))) == 2


def test_what_does_not_fit_is_skipped(monkeypatch):
    job = job_of(cases.EAGER, cases.INPLACE, case=cases.SCALING[-1])
    fitting, skipped = bench.split_by_memory(job, available=job.needed_bytes(cases.INPLACE))
    assert fitting == [cases.INPLACE]
    assert [(record.variant, record.status) for record in skipped] == [(cases.EAGER, "skipped")]
    monkeypatch.setattr(bench, "cpu_bytes", lambda: 10**9)
    made = bench.Bench().do(job)
    assert {record.status for record in made} == {"skipped"}
    assert "GB of memory, 1.0 are free" in made[0].note
    # On a GPU inputs and their copies.
    job = job_of(cases.EAGER, *cases.OURS, case=cases.SCALING[-1], device=cases.CUDA)
    fitting, skipped = bench.split_by_memory(job, int(3.5 * job.case.logits_bytes))
    assert (fitting, [record.variant for record in skipped]) == ([*cases.OURS], [cases.EAGER])


def test_what_comes_too_late_is_skipped():
    made = bench.do_all([job_of(cases.EAGER)], bench.Bench(), bench.Console(width=200), seconds=-1)
    assert [(record.status, record.note) for record in made] == [("skipped", "the -1 s were over")]


# ---- the command -----------------------------------------------------------------------------------------------------

FILES = {cases.CPU: ["linear.csv", "linear.png", "results.csv", "scaling.png", "vocabulary.png"]}
FILES[cases.CUDA] = ["gpu.csv", "gpu.png", "gpu_linear.csv", "gpu_linear.png"]


@pytest.mark.parametrize("device", [cases.CPU, cases.CUDA])
@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ("", lambda name: True),
        ("--op linear", lambda name: "linear" in name),
        ("--op softmax", lambda name: False),
        ("--quick", lambda name: False),
    ],
)
def test_the_command(device, arguments, written, monkeypatch, tmp_path, capsys):
    """Files are written by default where all of their operators were measured."""

    def do(self: bench.Bench, job: Job) -> list[results.Record]:
        figures = {"median": 2.0, "q1": 1.0, "q3": 3.0, "n": 9}
        pairs = [(variant, what) for variant in (*job.variants, cases.COPY) for what in job.whats]
        return [results.Record.of(job, *pair, "ok", **figures) for pair in pairs]

    monkeypatch.setattr(bench.Bench, "do", do)
    monkeypatch.setattr(bench, "gpu_l2_bytes", lambda: L2)
    monkeypatch.setattr(results, "describe_cpu", lambda versions: CPU)
    monkeypatch.setattr(results, "describe_gpu", lambda: GPU)
    monkeypatch.setattr(bench, "DEFAULT_DIRECTORY", tmp_path)
    assert bench.main(["--device", device, *arguments.split()]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in FILES[device] if written(name)]
    assert "Measured on" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "code"), [("WRONG", 1), ("failed", 1), ("skipped", 0), ("unavailable", 0)])
def test_the_status_says_whether_all_was_right(status, code, monkeypatch, tmp_path, capsys):
    line = {**LINE, "variant": cases.DEFAULT, "status": status, "note": "the reason", "median": None}
    script = f"import json\ninput()\nfor line in {[LINE, line]}: print(json.dumps(line))\nprint('{{}}', flush=True)"
    monkeypatch.setattr(bench, "command_of", lambda job, python: [sys.executable, "-c", script])
    assert bench.main(["--only", "8x10-f32", "--op", "softmax", "--output", str(tmp_path)]) == code
    assert f"default: {status}: the reason" in capsys.readouterr().out
    assert (tmp_path / "results.csv").exists()


def test_peers_that_are_not_installed():
    assert bench.peer_versions(sys.executable) == dict.fromkeys(("jax", "optax", "tensorflow"), "")
