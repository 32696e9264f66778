"""fresh.py: what fails in its processes fails the test, and no process of a test goes on as a second pytest."""

import os

import fresh
import pytest
import torch

pytestmark = pytest.mark.devices("cpu")


def wrong(what: str) -> None:
    raise ValueError(f"wrong: {what}")


def ended() -> None:
    raise SystemExit(3)


def right(answer: int) -> None:
    assert answer == 42


def forks_a_failure() -> None:
    fresh.wait(fresh.fork(wrong, "in the fork"))


def forks_an_end() -> None:
    fresh.wait(fresh.fork(ended))


def forks_after_a_backward() -> None:
    """Which torch refuses to the fork where autograd has threads, as it may have in a process of pytest."""
    x = torch.ones(3, requires_grad=True)
    x.sum().backward()
    fresh.wait(fresh.fork(lambda: x.sum().backward()))


@pytest.mark.parametrize("function", [forks_a_failure, forks_an_end])
def test_a_failure_in_the_fork_is_seen(function):
    with pytest.raises(AssertionError, match="the forked process ended with status 1"):
        fresh.run(function)


def test_a_failure_is_seen():
    fresh.run(right, 42)
    with pytest.raises(AssertionError, match="ValueError: wrong: here"):
        fresh.run(wrong, "here")


def test_backward_in_a_fork():
    fresh.run(forks_after_a_backward)


def test_pytest_itself_does_not_fork():
    with pytest.raises(RuntimeError, match="a process of its own"):
        os.fork()
