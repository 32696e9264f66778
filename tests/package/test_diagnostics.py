"""``python -m softmax_ext``, a broken or missing library, and the choice of the instruction set by the environment.

Each case is a Python process of its own, on a copy of the package where something is broken.
"""

import os
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch
from processes import COMMAND, REFUSED, copy_of_the_package, python, report, started, the_library

import softmax_ext
from softmax_ext import cuda, ops

pytestmark = pytest.mark.devices("cpu")

where_cuda_is_built = pytest.mark.skipif(
    torch.version.cuda is None or cuda.path() is None, reason="no CUDA in this torch, or no CUDA library"
)


@pytest.fixture(params=["missing", "garbage", "another library"])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a package whose library cannot be loaded."""
    library = the_library(copy_of_the_package(tmp_path))
    library.unlink()
    if request.param == "garbage":
        library.write_bytes(b"\x7fELF and then nothing of use" * 10)
    elif request.param == "another library":  # loads, but has none of our functions
        shutil.copy(Path(torch.__file__).parent / "lib" / "libshm.so", library)
    return tmp_path


def test_report():
    result = started("-m", "softmax_ext")
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    lines = report(result)
    assert lines["softmax_ext"] == softmax_ext.__version__
    assert platform.python_version() in lines["python"]
    assert lines["torch running"] == torch.__version__
    assert ops.library.built_torch in result.stdout
    assert ops.library.compiler in result.stdout
    assert ops.library.path in result.stdout
    assert re.search(r"\d+", lines["threads"])
    for name in ops.library.compiled_isas():
        assert name in lines["CPU kernels compiled"]
    for name in ops.library.available_isas():
        assert name in lines["CPU kernels available"]
    assert lines["CPU kernels chosen"].split()[0] in ops.library.available_isas()
    assert "torch.mm" in lines["float32 products"]


@pytest.mark.skipif(torch.version.cuda is not None and cuda.path() is not None, reason="there is")
def test_report_says_why_there_is_no_cuda():
    assert re.match(r"no: .+", report(python("-m", "softmax_ext"))["CUDA"])


@where_cuda_is_built
def test_report_of_the_cuda_kernels():
    lines = report(python("-m", "softmax_ext"))
    assert lines["CUDA"].startswith(str(torch.version.cuda))
    assert cuda.architectures().split(";")[0] in lines["CUDA kernels compiled"]
    for device in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(device) in lines[f"CUDA device {device}"]


# The same numbers as torch's, beside the CUDA library.
ON_THE_CPU = """
import torch, softmax_ext
from softmax_ext import cuda
assert not torch.cuda.is_available()
assert cuda.library is not None, cuda.missing
print(cuda.architectures())
x = torch.randn(5, 7, requires_grad=True)
y = torch.arange(5)
loss, right = softmax_ext.cross_entropy(x, y), torch.nn.functional.cross_entropy(x, y)
torch.testing.assert_close(loss, right)
torch.testing.assert_close(*(torch.autograd.grad(l, x)[0] for l in (loss, right)))
torch.testing.assert_close(softmax_ext.softmax(x, 1), x.softmax(1))
"""


@where_cuda_is_built
def test_the_cuda_library_loads_without_a_gpu():
    """Once built it is never left out in silence: not on a machine without a GPU either."""
    result = python("-c", ON_THE_CPU, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert re.match(r"\d+", result.stdout)


@pytest.mark.parametrize("kind", ["missing", "garbage", "another library"])
def test_cuda_tensors_without_the_cuda_library(kind, tmp_path):
    """The CPU works; a CUDA tensor is refused in a sentence with the command."""
    copy_of_the_package(tmp_path)
    library = the_library(tmp_path, "cuda")
    library.unlink(missing_ok=True)
    if kind == "garbage":
        library.write_bytes(b"\x7fELF and then nothing of use" * 10)
    elif kind == "another library":
        shutil.copy(Path(torch.__file__).parent / "lib" / "libshm.so", library)
    result = python("-c", REFUSED, path=tmp_path)
    assert result.returncode == 0, result.stderr
    said = "built without CUDA" if kind == "missing" else "do not load with torch"
    assert said in result.stdout
    assert COMMAND in result.stdout
    assert "input.cpu()" in result.stdout
    assert len(result.stdout) < 600


def test_report_without_the_library(broken):
    """It runs, says what is wrong and what to type, and fails."""
    result = python("-m", "softmax_ext", path=broken)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = report(result)
    assert lines["torch running"] == torch.__version__
    assert lines["CPU library"].startswith("NOT LOADED: the CPU library ")
    assert COMMAND in lines["CPU library"]


def test_import_without_the_library(broken):
    """One sentence, with the command, and not a dump of symbols."""
    result = python("-c", "import softmax_ext", path=broken)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: softmax_ext: the CPU library ")
    assert COMMAND in last
    assert len(last) < 600


def test_import_error_can_be_caught(tmp_path):
    """For a package to which ours is an option: it fails again at the second import, and torch works."""
    the_library(copy_of_the_package(tmp_path)).unlink()
    program = """
import torch
for attempt in range(2):
    try:
        import softmax_ext
    except ImportError as error:
        assert "softmax_ext: the CPU library is not built" in str(error), error
    else:
        raise SystemExit("imported")
torch.nn.functional.softmax(torch.randn(3), 0)
"""
    result = started("-c", program, path=tmp_path)
    assert result.returncode == 0, result.stderr


def test_missing_and_broken_are_told_apart(tmp_path):
    copy_of_the_package(tmp_path)
    library = the_library(tmp_path)
    library.write_bytes(b"not a library")
    assert "does not load with torch" in report(python("-m", "softmax_ext", path=tmp_path))["CPU library"]
    library.unlink()
    assert "is not built" in report(python("-m", "softmax_ext", path=tmp_path))["CPU library"]


def test_source_folder_that_hides_an_installed_package(tmp_path):
    """Python started in a clone where nothing is built: both folders are named, and what to do."""
    installed = the_library(copy_of_the_package(tmp_path / "site"))
    clone = tmp_path / "clone"
    the_library(copy_of_the_package(clone)).unlink()
    for start in (("-c", "import softmax_ext"), ("-m", "softmax_ext")):
        result = python(*start, path=f"{clone}{os.pathsep}{installed.parents[1]}")
        assert result.returncode == 1
        said = result.stdout + result.stderr
        assert f"not in {clone / 'softmax_ext'}, the folder of the package that runs" in said
        assert f"which hides the one in {installed.parent}; start Python in another folder" in said
        assert "pip install --no-build-isolation --editable ." in said


def test_no_python_is_in_the_name_of_the_library():
    """One file serves every version of it."""
    assert Path(ops.library.path).name == "libsoftmax_ext_cpu.so"


WHEEL = """Wheel-Version: 1.0
Generator: a test
Root-Is-Purelib: false
Tag: py3-none-manylinux_2_28_x86_64
"""


def test_report_of_the_wheel(tmp_path):
    """By the record beside the package; one of another package, or none, is no wheel."""
    copy_of_the_package(tmp_path / "site")
    record = tmp_path / "site" / f"softmax_ext-{softmax_ext.__version__}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: softmax_ext\nVersion: {softmax_ext.__version__}\n")
    (record / "WHEEL").write_text(WHEEL)
    wheel = f"softmax_ext-{softmax_ext.__version__}-py3-none-manylinux_2_28_x86_64.whl"
    said = report(python("-m", "softmax_ext", path=tmp_path / "site"))["installed from"]
    assert said == f"{wheel} in {tmp_path / 'site' / 'softmax_ext'}"
    copy_of_the_package(tmp_path / "clone")
    said = report(python("-m", "softmax_ext", path=f"{tmp_path / 'clone'}{os.pathsep}{tmp_path / 'site'}"))
    assert said["installed from"] == f"no wheel: it runs from {tmp_path / 'clone' / 'softmax_ext'}"


# ---- the instruction set -------------------------------------------------------------------------------------------

ASK = "import softmax_ext; from softmax_ext import ops; print(ops.library.selected_isa())"


@pytest.mark.parametrize("name", ops.library.available_isas())
def test_forced(name):
    """In any spelling, and against the choice that torch was told to make."""
    result = python("-m", "softmax_ext", SOFTMAX_EXT_CPU_CAPABILITY=name.lower(), ATEN_CPU_CAPABILITY="default")
    assert report(result)["CPU kernels chosen"].split()[0] == name
    assert report(result)["CPU as torch sees it"] == "DEFAULT"


def test_torchs_choice_is_followed():
    assert python("-c", ASK, ATEN_CPU_CAPABILITY="default").stdout.strip() == "DEFAULT"
    capability = torch.backends.cpu.get_cpu_capability()
    expected = capability if capability in ops.library.available_isas() else "DEFAULT"
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        assert python("-c", ASK).stdout.strip() == expected
    if "AVX2" in ops.library.available_isas():
        assert python("-c", ASK, ATEN_CPU_CAPABILITY="avx2").stdout.strip() == "AVX2"


@pytest.mark.parametrize("value", ["AVX9", "1", "foo"])
def test_wrong_value(value):
    """The error names the variable, what it got and what it may be."""
    result = python("-c", ASK, SOFTMAX_EXT_CPU_CAPABILITY=value)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "SOFTMAX_EXT_CPU_CAPABILITY" in last
    assert value.lower() in last.lower()
    for name in ops.library.available_isas():
        assert name in last


def test_wrong_value_in_the_report():
    """The report is what one runs to find out what is wrong."""
    result = python("-m", "softmax_ext", SOFTMAX_EXT_CPU_CAPABILITY="AVX9")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "SOFTMAX_EXT_CPU_CAPABILITY" in result.stdout
    assert "AVX9" in result.stdout


def test_empty_value_is_none():
    assert python("-c", ASK, SOFTMAX_EXT_CPU_CAPABILITY="").stdout == python("-c", ASK).stdout


def test_same_values_whatever_is_forced():
    """To rounding: each set of kernels is reached, and computes the loss."""
    program = """
import torch, softmax_ext
x = torch.linspace(-3, 3, 5 * 100, dtype=torch.float64).view(5, 100).sin().requires_grad_()
loss = softmax_ext.cross_entropy(x, torch.arange(5))
loss.backward()
print(loss.item(), x.grad.abs().sum().item())
"""
    outputs = [python("-c", program, SOFTMAX_EXT_CPU_CAPABILITY=n).stdout for n in ops.library.available_isas()]
    numbers = [torch.tensor([float(v) for v in output.split()], dtype=torch.float64) for output in outputs]
    assert all(len(n) == 2 for n in numbers)
    for other in numbers[1:]:
        torch.testing.assert_close(other, numbers[0])


# ---- select_isa in this process ------------------------------------------------------------------------------------


def test_select_isa_in_the_process():
    before = ops.library.selected_isa()
    try:
        for name in ops.library.available_isas():
            ops.library.select_isa(name)
            assert ops.library.selected_isa() == name
        with pytest.raises(ValueError, match=r"isa must be one of .*; got AVX9"):
            ops.library.select_isa("AVX9")
        assert ops.library.selected_isa() == name
    finally:
        ops.library.select_isa(before)
