"""A library file that is another, or of another build.

Each case is a process of its own. test_diagnostics.py has the library that is missing or no library at all.
"""

import platform
import re
from pathlib import Path

import pytest
import torch
from processes import COMMAND, REFUSED, copy_of_the_package, python, report, the_library

import softmax_ext
from softmax_ext import ops

pytestmark = pytest.mark.devices("cpu")

linux = pytest.mark.skipif(platform.system() != "Linux", reason="of Linux: ELF files")


# ---- the CPU library's file ----


def assert_refused(where: Path, built: str, running: str = torch.__version__) -> None:
    """The import gives one sentence with both versions and the command; the report runs and says the same."""
    imported = python("-c", "import softmax_ext", path=where)
    assert imported.returncode == 1, imported
    sentence = imported.stderr.strip().splitlines()[-1]
    library = the_library(where)
    assert sentence.startswith(f"ImportError: softmax_ext: the CPU library {library} was found but does not load with ")
    assert f"torch {running}: it was built as {built} (" in sentence
    assert COMMAND in sentence
    assert len(sentence) < 600
    result = python("-m", "softmax_ext", path=where)
    assert result.returncode == 1, result
    assert not result.stderr
    lines = report(result)
    assert lines["torch running"] == running
    assert lines["CPU library"].startswith("NOT LOADED: ")
    assert f"it was built as {built} (" in lines["CPU library"]


def replace(file: Path, old: bytes, new: bytes) -> None:
    """Once or more, at the same length, so that nothing else moves."""
    content = file.read_bytes()
    assert len(old) == len(new)
    assert old in content
    file.write_bytes(content.replace(old, new))


BUILT = f"softmax_ext {softmax_ext.__version__}, torch {ops.library.built_torch}"


@linux
def test_built_for_another_torch(tmp_path):
    """One that had a function which this torch has not."""
    library = the_library(copy_of_the_package(tmp_path))
    replace(library, b"\0aoti_torch_empty_strided\0", b"\0aoti_torch_empty_stridex\0")
    other = re.sub(r"torch \d", "torch 9", BUILT)
    replace(library, BUILT.encode(), other.encode())
    assert_refused(tmp_path, other)
    assert "aoti_torch_empty_stridex" in python("-m", "softmax_ext", path=tmp_path).stdout


def test_of_another_version_of_the_package(tmp_path):
    """As when the Python files alone were updated."""
    copy_of_the_package(tmp_path)
    version = tmp_path / "softmax_ext" / "_version.py"
    version.write_text(version.read_text().replace(softmax_ext.__version__, "99.0"))
    assert_refused(tmp_path, BUILT)
    assert "the rest of the package is softmax_ext 99.0" in python("-m", "softmax_ext", path=tmp_path).stdout


@linux
@pytest.mark.parametrize("size", [0, 63])
def test_without_a_record(size, tmp_path):
    """Empty, or the beginning of a library, as a full disk leaves it."""
    library = the_library(copy_of_the_package(tmp_path))
    library.write_bytes(library.read_bytes()[:size])
    assert_refused(tmp_path, "unknown versions (it is damaged, or another library)")
    assert "it has no record of its build" in python("-m", "softmax_ext", path=tmp_path).stdout


@linux
def test_no_file(tmp_path):
    """Something of that name that can't be read as a file."""
    library = the_library(copy_of_the_package(tmp_path))
    library.unlink()
    library.symlink_to("nowhere.so")
    result = python("-m", "softmax_ext", path=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert COMMAND in report(result)["CPU library"]
    assert "No such file" in report(result)["CPU library"]


@linux
def test_two_copies_in_one_process(tmp_path):
    """As where a notebook goes from an installed package to a source folder. Torch would register operators twice."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        copy_of_the_package(tmp_path / name)
    script = f"""
import sys
import softmax_ext
for name in [name for name in sys.modules if name.startswith("softmax_ext")]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path / "two")!r})
import softmax_ext
"""
    result = python("-c", script, path=tmp_path / "one")
    assert result.returncode == 1, result
    sentence = result.stderr.strip().splitlines()[-1]
    assert f"this process has loaded {the_library(tmp_path / 'one')} already; start Python anew" in sentence


# ---- the CUDA library's file ----


REPORT_WITH_CUDA = """
import runpy, torch
torch.version.cuda = torch.version.cuda or "13.0"
runpy.run_module("softmax_ext", run_name="__main__")
"""


def not_loaded(kind: str, content: bytes) -> tuple[bytes, str, str]:
    """A library's content, what it says it was built as, and why it is not loaded."""
    if kind == "another version":
        other = BUILT.replace(softmax_ext.__version__, "9" + softmax_ext.__version__[1:])
        return content.replace(BUILT.encode(), other.encode()), other, f"of the package is {BUILT.split(',')[0]}"
    return content.replace(b"\0aoti_torch_empty_strided\0", b"\0aoti_torch_empty_stridex\0"), BUILT, "empty_stridex"


@linux
@pytest.mark.parametrize("kind", ["another version", "another torch"])
def test_cuda_library_that_is_not_loaded(kind, tmp_path):
    """The CPU works, CUDA tensors are refused with both versions, and the report fails. (It is the CPU's.)"""
    library = the_library(copy_of_the_package(tmp_path))
    content, built, reason = not_loaded(kind, library.read_bytes())
    assert content != library.read_bytes()
    the_library(tmp_path, "cuda").write_bytes(content)
    refused = python("-c", REFUSED, path=tmp_path)
    assert refused.returncode == 0, refused.stderr
    assert f"with torch {torch.__version__}: they were built as {built} (" in refused.stdout
    assert reason in refused.stdout
    assert COMMAND in refused.stdout
    result = python("-c", REPORT_WITH_CUDA, path=tmp_path)
    assert result.returncode == 1, result
    assert built in report(result)["CUDA"]


# ---- both ----


def test_the_record_is_in_the_built_file():
    """What the sentences above are read from."""
    assert Path(ops.library.path).read_bytes().count(f"build record: {BUILT}\0".encode()) == 1
