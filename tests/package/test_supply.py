"""Pinned tools, an sdist and a wheel of the same bytes, and nothing that is fetched, started or written at run time."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from processes import python

if sys.version_info >= (3, 11):
    import tomllib

pytestmark = pytest.mark.devices("cpu")

ROOT = Path(__file__).resolve().parents[2]
IGNORED = [".git", ".venv*", "build", "dist", "demo", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis"]


def needs_the_checkout() -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("tests without the sources")


# ---- pinned tools ----------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, list[str]]:
    """The versions of each name in constraints.txt: one, or one for each of several Pythons."""
    needs_the_checkout()
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if requirement := line.partition("#")[0].strip():
            match = re.fullmatch(r"([\w.-]+)==([\w.!+]+)(\s*;.+)?", requirement)
            assert match, f"not one exact version: {line!r}"
            pins.setdefault(canonical(match[1]), []).append(match[2])
    return pins


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_every_requirement_is_pinned():
    """Those of the build, of every group, and those that they need in turn; torch is the user's choice, by TORCH."""
    pins = pinned()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["project"]["optional-dependencies"]
    of_groups = [one for group in groups.values() for one in group if not one.startswith("softmax_ext[")]
    wanted = [*project["build-system"]["requires"], *of_groups]
    names = {canonical(re.match(r"[\w.-]+", one)[0]) for one in wanted}
    seen = set()
    while names - seen:
        name = (names - seen).pop()
        seen.add(name)
        assert name in pins, f"{name} is not in constraints.txt"
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of a group that is not installed here
        names |= {canonical(re.match(r"[\w.-]+", one)[0]) for one in requirements if ";" not in one} - {"torch"}
    assert "torch" not in pins


def test_the_pins_are_what_torch_needs():
    """make installs both at once, with whatever TORCH is; here the torch that is installed."""
    pins = pinned()
    for requirement in map(Requirement, metadata.requires("torch")):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            for version in pins.get(canonical(requirement.name), []):
                assert requirement.specifier.contains(version), requirement


def test_setuptools_is_one_that_every_torch_takes():
    """2.11 and 2.12 need one before 82; those after it, one from 77 on."""
    (version,) = pinned()["setuptools"]
    assert version in SpecifierSet(">=77.0.3,<82")


def test_make_and_ci_install_by_the_constraints():
    """Every pip install but that of the benchmarks' peers, which have a file of exact versions themselves."""
    needs_the_checkout()
    text = (ROOT / "Makefile").read_text() + (ROOT / ".ci" / "run").read_text()
    installs = re.findall(r"^.*(?:PIP\)|pip-version-check) install (?!--requirement).*$", text, re.MULTILINE)
    assert len(installs) >= 4
    for line in installs:
        assert "constraint" in line.lower() or "==" in line, line


# ---- sdist -----------------------------------------------------------------------------------------------------------


EPOCH = {"SOURCE_DATE_EPOCH": "315532800"}  # as make dist and make wheel set it


def sdist(source: Path, where: Path, umask: int) -> Path:
    """Of a copy of the sources, whose files are as new as the copy."""
    copy = where / "another name"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*IGNORED), copy_function=shutil.copy)
    command = [copy / ".ci" / "make_sdist", sys.executable]
    subprocess.run(command, check=True, timeout=120, umask=umask, env=os.environ | EPOCH)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    return archive


def test_sdist_is_the_same_bytes_twice_and_holds_the_sources(tmp_path):
    """At another time, in another place, by someone whose new files nobody else may read: what git has, no more."""
    needs_the_checkout()
    one = sdist(ROOT, tmp_path / "one", 0o022)
    os.utime(tmp_path / "one" / "another name" / "setup.py", (0, 0))
    (tmp_path / "one" / "another name" / "README.md").chmod(0o600)
    two = sdist(tmp_path / "one" / "another name", tmp_path / "elsewhere" / "two", 0o077)
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert {"LICENSE", "SECURITY.md", "CHANGELOG.md", "constraints.txt", "Makefile", ".ci/run"} <= names
    assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}
    assert {m.mode for m in members if m.isfile()} == {0o644, 0o755}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0:
        assert set(tracked.stdout.split()) <= names


# ---- wheel -----------------------------------------------------------------------------------------------------------


def wheel(where: Path) -> Path:
    """Of the library that is built here: what the compiler makes of the sources elsewhere is compared by .ci/run."""
    import softmax_ext

    copy = where / "another name"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*IGNORED), copy_function=shutil.copy)
    built = copy / "built" / "softmax_ext"
    built.mkdir(parents=True)
    for library_here in Path(softmax_ext.__file__).parent.glob("libsoftmax_ext_*.so"):
        shutil.copy(library_here, built)
    (copy / "setup.cfg").write_text("[build]\nbuild_lib = built\n")
    command = [sys.executable, "setup.py", "-q", "build_py", "bdist_wheel", "--skip-build", "--dist-dir", where]
    subprocess.run(command, cwd=copy, check=True, timeout=120, umask=0o022, env=os.environ | EPOCH | {"FORCE_CPU": "1"})
    (archive,) = where.glob("*.whl")
    return archive


def test_wheel_is_for_every_python_and_the_same_bytes_twice(tmp_path):
    """By its name, by what it says and holds; at another time, in another place."""
    needs_the_checkout()
    path = wheel(tmp_path / "one")
    assert path.read_bytes() == wheel(tmp_path / "elsewhere" / "two").read_bytes()
    assert re.fullmatch(r"softmax_ext-[\d.]+-py3-none-linux_\w+\.whl", path.name)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        (record,) = (name for name in names if name.endswith("/WHEEL"))
        text = archive.read(record).decode()
    assert f"Tag: {path.stem.partition('-')[2].partition('-')[2]}\n" in text
    assert "Root-Is-Purelib: false\n" in text
    libraries = {name for name in names if ".so" in name}
    assert "softmax_ext/libsoftmax_ext_cpu.so" in libraries
    assert not [name for name in libraries if "cpython" in name or "_C" in name]
    modules = (ROOT / "softmax_ext").rglob("*.py")
    assert {str(file.relative_to(ROOT)) for file in modules} <= names


def test_license():
    needs_the_checkout()
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("BSD 3-Clause License")
    assert len(re.findall(r"^\d\. ", text, re.MULTILINE)) == 3
    assert 'license = "BSD-3-Clause"' in (ROOT / "pyproject.toml").read_text()


# ---- run time --------------------------------------------------------------------------------------------------------

# Started after torch, which may do as it likes: what comes then is softmax_ext's.
WATCH = """
import os, sys, torch

def refuse(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and arguments[0] != os.devnull
    # torch makes that folder when its compiler is imported.
    if event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate"):
        writes = arguments[0] != os.environ["TORCHINDUCTOR_CACHE_DIR"]
    started = event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty")
    if writes or started or event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        os.write(2, f"refused: {event} {arguments}\\n".encode())
        os._exit(7)  # not an exception, which could be caught

sys.addaudithook(refuse)
"""

EVERYTHING = """
import itertools, runpy
import softmax_ext as s
torch.manual_seed(0)
dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
for dtype, precompute in itertools.product(dtypes, (False, True)):
    for shape in ((5, 7), (3, 300), (2, 200, 3)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
        for target in (y, torch.rand(shape).to(dtype)):
            loss, _ = s.cross_entropy(x, target, label_smoothing=0.1, precompute_grad=precompute, return_stats=True)
            loss.backward()
        s.cross_entropy(x * 1, y, precompute_grad=precompute, inplace=True).backward()
        for function in (s.softmax, s.log_softmax):
            function(x, 1).sum().backward()
    head = s.LinearCrossEntropyLoss(8, 30).to(dtype)
    head(torch.randn(9, 8).to(dtype).requires_grad_(), torch.arange(9)).backward()
for module in (s.Softmax(1), s.LogSoftmax(1)):
    module(torch.randn(2, 3))
s.CrossEntropyLoss()(torch.randn(2, 3), torch.tensor([0, 1]))
x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
(g,) = torch.autograd.grad(s.cross_entropy(x, torch.tensor([0, 1, 2])), x, create_graph=True)
g.square().sum().backward()
torch.func.vmap(torch.func.grad(lambda row: s.cross_entropy(row, torch.tensor(1))))(x)
try:
    runpy.run_module("softmax_ext", run_name="__main__")
except SystemExit as end:
    assert not end.code
print("all of it ran")
"""


def watched(script: str) -> subprocess.CompletedProcess[str]:
    return python("-c", WATCH + textwrap.dedent(script))


def test_nothing_is_fetched_started_or_written():
    result = watched(EVERYTHING)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all of it ran\n")


@pytest.mark.parametrize(
    "deed",
    [
        "import socket; socket.create_connection(('localhost', 9))",
        "import urllib.request; urllib.request.urlopen('http://localhost:9')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "open('/dev/full', 'w')",
        "import os; os.mkdir('/nowhere/at/all')",
        "import os; os.remove('/nowhere/at/all')",
    ],
)
def test_the_watch_notices(deed):
    result = watched(deed)
    assert result.returncode == 7, result.stderr
    assert "refused: " in result.stderr
