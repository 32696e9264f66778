"""Results of more than 32 MiB: the memory that is kept for them, and stores past the caches.

A row has the same bits wherever it stands, so a large result is compared with that of a few of its rows, which is small
and takes neither way.
"""

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import fresh
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from softmax_ext import cross_entropy, log_softmax, softmax

pytestmark = pytest.mark.devices("cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# More than 32 MiB in two bytes; odd, so that rows begin anywhere.
ROWS, CLASSES = 2003, 10007

KEPT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
needs_kept_memory = pytest.mark.skipif(not KEPT, reason="torch keeps no memory of ours before 2.11")


def _gradient(logits: Tensor, target: Tensor, **options) -> Tensor:
    logits = logits.detach().requires_grad_()
    cross_entropy(logits, target, reduction="sum", **options).backward()
    return logits.grad


def _exact(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, rtol=0, atol=0)


def _some_rows() -> list[slice]:
    return [slice(0, 3), slice(1000, 1003), slice(ROWS - 3, ROWS)]


# ---- stores past the caches ----------------------------------------------------------------------


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 5.0}], ids=["plain", "options"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_rows(dtype, options, precompute):
    logits, target = torch.randn(ROWS, CLASSES).to(dtype), torch.randint(0, CLASSES, (ROWS,))
    target[1::7] = -100
    weight = torch.rand(CLASSES).to(dtype) if options else None
    options = {**options, "weight": weight, "precompute_grad": precompute}
    large = _gradient(logits, target, **options)
    for rows in _some_rows():
        _exact(large[rows], _gradient(logits[rows], target[rows], **options))


@pytest.mark.parametrize("precompute", [False, True])
def test_gradients_with_probabilities(precompute):
    rows = 1003
    logits, target = torch.randn(rows, CLASSES), torch.rand(rows, CLASSES).requires_grad_()
    large = _gradient(logits, target, precompute_grad=precompute and not target.requires_grad)
    some = target.detach()[500:503].requires_grad_()
    _exact(large[500:503], _gradient(logits[500:503], some))
    _exact(target.grad[500:503], some.grad)
    _exact(
        _gradient(logits, target.detach(), precompute_grad=precompute)[500:503],
        _gradient(logits[500:503], some.detach(), precompute_grad=precompute),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [77777, 131072])
def test_gradient_of_columns(dtype, inner):
    """Classes apart; the tiles of 128 rows begin at a whole vector or anywhere."""
    batch, classes = 16, 19
    logits, target = torch.randn(batch, classes, inner).to(dtype), torch.randint(0, classes, (batch, inner))
    large = _gradient(logits, target)
    _exact(large[5:6], _gradient(logits[5:6], target[5:6]))
    _exact(large[:, :, -3:], _gradient(logits[:, :, -3:], target[:, -3:]))


@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(function, dtype):
    logits, upstream = torch.randn(2, ROWS, CLASSES).to(dtype)
    large = logits.requires_grad_()
    result = function(large, 1)
    result.backward(upstream)
    for rows in _some_rows():
        some = logits.detach()[rows].requires_grad_()
        of_some = function(some, 1)
        of_some.backward(upstream[rows])
        _exact(result[rows], of_some)
        _exact(large.grad[rows], some.grad)


def test_softmax_of_columns():
    logits = torch.randn(8, 33, 50001).requires_grad_()
    result = softmax(logits, 1)
    result.backward(logits.detach())
    some = logits.detach()[3:4].requires_grad_()
    of_some = softmax(some, 1)
    of_some.backward(some.detach())
    _exact(result[3:4], of_some)
    _exact(logits.grad[3:4], some.grad)


# ---- kept memory ---------------------------------------------------------------------------------


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(1009, CLASSES)


@pytest.fixture
def target() -> Tensor:
    return torch.randint(0, CLASSES, (1009,))


@needs_kept_memory
def test_a_freed_gradient_is_the_next_ones_memory(logits, target):
    first = _gradient(logits, target)
    place, values = first.data_ptr(), first.clone()
    del first
    second = _gradient(logits, target)
    assert second.data_ptr() == place
    _exact(second, values)
    row = second[7]  # a view holds the memory
    del second
    third = _gradient(-logits, target)
    assert third.data_ptr() != place
    _exact(row, values[7])


@needs_kept_memory
def test_a_smaller_result_fits_a_much_smaller_one_does_not(logits, target):
    wide = logits.double().repeat(2, 1), target.repeat(2)
    both = [_gradient(*wide), _gradient(*wide)]
    del both  # and are kept, instead of what an earlier test left
    place = _gradient(logits, target).data_ptr()
    assert _gradient(logits[:900], target[:900]).data_ptr() == place
    place = _gradient(logits.double().repeat(2, 1), target.repeat(2)).data_ptr()
    assert _gradient(logits[:900], target[:900]).data_ptr() != place


# Prints the bytes that the system may take at any time, before and after five gradients are freed.
FREED_GRADIENTS = """
import re, torch
from softmax_ext import cross_entropy
def lazily_free():
    smaps = open("/proc/self/smaps").read()
    return 1024 * sum(map(int, re.findall(r"^LazyFree:\\s+(\\d+) kB", smaps, re.MULTILINE)))
def gradient():
    logits = torch.zeros(1009, 10007, requires_grad=True)
    cross_entropy(logits, torch.zeros(1009, dtype=torch.long)).backward()
    return logits.grad
gradients = [gradient() for _ in range(5)]
before = lazily_free()
size = gradients[0].nbytes
del gradients
print(before, lazily_free(), size)
"""


@needs_kept_memory
def test_two_freed_results_are_kept_and_the_systems_when_it_needs_them():
    if "LazyFree" not in Path("/proc/self/smaps").read_text():
        pytest.skip("this system has no MADV_FREE")
    printed = subprocess.run([sys.executable, "-c", FREED_GRADIENTS], capture_output=True, text=True, check=True).stdout
    before, after, size = map(int, printed.split())
    assert before == 0
    assert 1.9 * size <= after <= 2.2 * size


def test_an_ignored_row_is_zero_in_used_memory(logits, target):
    _gradient(logits, target)
    target[::2] = -100
    for precompute in (False, True):
        gradient = _gradient(logits, target, precompute_grad=precompute)
        assert not gradient[::2].any()
        del gradient


def test_strides_of_a_transposed_view():
    logits = torch.randn(2, 700, 8009).transpose(1, 2)
    target = torch.randint(0, 8009, (2, 700))
    gradient = _gradient(logits, target)
    assert gradient.stride() == logits.stride()
    _exact(gradient[:1, :, :2], _gradient(logits[:1, :, :2], target[:1, :2]))


def test_a_gradient_is_a_tensor_like_any_other(logits, target):
    gradient = _gradient(logits, target)
    copy = gradient.clone()
    _exact(pickle.loads(pickle.dumps(gradient)), copy)
    _exact(torch.from_numpy(gradient.numpy()), copy)
    gradient.mul_(2).share_memory_()
    _exact(gradient, 2 * copy)


def test_threads_do_not_share_memory(logits, target):
    expected, results = _gradient(logits, target), [[] for _ in range(4)]

    def work(mine: list[Tensor]) -> None:
        for _ in range(3):
            mine[:] = [_gradient(logits, target)]

    threads = [threading.Thread(target=work, args=(mine,)) for mine in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({mine[0].data_ptr() for mine in results}) == 4
    for mine in results:
        _exact(mine[0], expected)


def forking() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    logits, target = torch.randn(1009, CLASSES), torch.randint(0, CLASSES, (1009,))
    expected = _gradient(logits, target)
    _gradient(logits, target)  # freed: the child inherits it
    child = fresh.fork(lambda: _exact(_gradient(-logits, target), _gradient(-logits, target)))
    mine = _gradient(logits, target)
    fresh.wait(child)
    _exact(mine, expected)


def test_a_forked_process_has_memory_of_its_own():
    fresh.run(forking)
