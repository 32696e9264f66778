"""benchmarks/gpu_times, on the emulator: its small cases are right, and its table and CSV have all of them."""

import csv
import os
import subprocess

import emulator
import pytest

pytestmark = [pytest.mark.devices("cpu"), pytest.mark.slow]  # it compiles the kernels for the emulator

CASES = [f"tiny-{shape}-{dtype}" for shape in ("5x2101", "9x10", "2x21x33") for dtype in ("bf16", "f32")]
PASSES = ["copy", "forward", "backward", "fused", "fused in place"]
PASSES += [f"{name}{of}" for of in ("", " backward") for name in ("softmax", "log_softmax")]
OPTIONS = ["smoothing", "weight", "z_loss", "softcap", "probabilities", "stats"]
WITH_OPTIONS = [f"{name}, {option}" for option in OPTIONS for name in ("forward", "backward", "fused")]
LAUNCHES = {"copy": 0, "forward": 2, "fused": 3}  # at most; of all else 1. The emulator does not count copies.


@pytest.fixture(scope="module")
def program():
    return emulator.build("gpu_times")


def run(program, *arguments):
    environment = {**os.environ, "SOFTMAX_EXT_COMMIT": "abc123"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_small_cases(program, tmp_path):
    done = run(program, "--case", "tiny", "--csv", str(tmp_path / "times.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "times.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(case, name) for case in CASES for name in PASSES + (WITH_OPTIONS if "2101" in case else [])]
    assert [(row["case"], row["pass"]) for row in rows] == expected
    printed = done.stdout.splitlines()
    assert printed[0].startswith("emulated, driver ")
    assert printed[0].endswith(", commit abc123")
    assert len(printed) == len(rows) + 3
    for row, line in zip(rows, printed[3:], strict=True):
        assert line.startswith(row["case"])
        assert row["right"] == "1"
        assert float(row["ms"]) > 0
        assert float(row["loss_error"]) < 1e-6
        assert float(row["gradient_error"]) < (1e-5 if row["case"].endswith("f32") else 2**-8 + 1e-5)
        assert int(row["launches"]) <= LAUNCHES.get(row["pass"].partition(",")[0].removesuffix(" in place"), 1)
        has_gradient = row["pass"] != "copy" and not row["pass"].startswith("forward")
        assert (float(row["gradient_error"]) > 0) == has_gradient  # it was looked at: no result is exact


@pytest.mark.parametrize(
    ("case", "name", "moved"),
    [
        ("5x2101-f32", "forward", 5 * (2101 * 4 + 16)),
        ("5x2101-f32", "backward", 5 * (2 * 2101 * 4 + 16)),
        ("5x2101-bf16", "fused", 5 * (2 * 2101 * 2 + 8)),
        ("2x21x33-bf16", "softmax backward", 3 * 2 * 21 * 33 * 2),
        ("5x2101-bf16", "fused, probabilities", 3 * 5 * 2101 * 2),
    ],
)
def test_bytes_and_filters(program, tmp_path, case, name, moved):
    done = run(program, "--case", f"tiny-{case}", "--pass", name, "--csv", str(tmp_path / "times.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "times.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["case"] == f"tiny-{case}" and (name in row["pass"] or row["pass"] == "copy") for row in rows)
    assert [int(row["bytes"]) for row in rows if row["pass"] == name] == [moved]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "usage: "),
        (["--case"], "usage: "),
        (["--case", "nothing"], "no case or no pass has such a name"),
        (["--case", "tiny", "--pass", "nothing"], "no case or no pass has such a name"),
    ],
)
def test_how_it_is_called(program, arguments, words):
    done = run(program, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
