"""The emulator, which runs the CUDA kernels in the tests: what it computes, and what it catches.

Every kernel that is wrong on purpose has a right one beside it, in selftest.cu.
"""

import os
import subprocess

import emulator
import pytest

pytestmark = [pytest.mark.devices("cpu"), pytest.mark.slow]  # it compiles the emulator

RIGHT, WRONG = 0, 1  # exit statuses of the program
SEEDS = range(5)


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def sanitized(request):
    return request.param == "sanitized"


@pytest.fixture(scope="module")
def selftest(sanitized):
    return emulator.build("selftest", sanitized)


def run(program, name, seed=0, **variables):
    environment = {**os.environ, "SOFTMAX_EXT_EMULATED_SEED": str(seed), **variables}
    done = subprocess.run([program, name], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode != 2, f"no test of the name {name}"
    return done


@pytest.mark.parametrize(
    "name",
    [
        "block_sums",
        "barrier_of_some_exited",
        "lanes",
        "cluster_sum",
        "within_bounds",
        "uninitialised",
        "vector_load",
        "count",
        "limits",
        "halves",
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_is_right(selftest, name, seed):
    for variables in ({}, {"SOFTMAX_EXT_EMULATED_YIELD": "1"}):
        done = run(selftest, name, seed, **variables)
        assert done.returncode == RIGHT, done.stderr


@pytest.mark.parametrize("name", ["block_sums_without_first_barrier", "block_sums_without_second_barrier"])
def test_a_missing_barrier_gives_a_wrong_sum(selftest, name):
    statuses = [run(selftest, name, seed).returncode for seed in SEEDS]
    assert set(statuses) <= {RIGHT, WRONG}
    assert WRONG in statuses


CAUGHT = {
    "lane_exits": ["deadlock", "threads 7 to 7: exited", "wait at a shuffle of lanes 0xffffffff"],
    "different_collectives": ["deadlock", "threads 0 to 15: wait at __syncwarp", "16 to 31: wait at __syncthreads"],
    "outside_of_mask": ["a shuffle of lanes 0x0000ffff reads lane 16"],
    "misaligned_vector_load": ["misaligned access of 16 bytes"],
}


@pytest.mark.parametrize("name", CAUGHT)
def test_an_error_stops_the_program_with_a_report(selftest, name):
    done = run(selftest, name)
    assert done.returncode not in (RIGHT, WRONG)
    for words in [*CAUGHT[name], "in kernel(", "seed 0"]:
        assert words in done.stderr


FAULTS = {
    "overrun": "byte 128 of the shared memory of block (0, 0, 0), which is out of bounds",
    "cluster_sum_without_last_sync": "of the cluster has exited",
    "cluster_peer_exited": "which has exited",
    "cluster_peer_not_begun": "which has not begun",
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_access_to_memory_that_is_not_there_is_caught(selftest, sanitized, name):
    """Where it hangs on the order of the blocks, then by one of the seeds."""
    reports = [run(selftest, name, seed).stderr for seed in SEEDS]
    words = FAULTS[name]
    if sanitized and "which" in words:
        words = "AddressSanitizer: use-after-poison"
    assert any(words in report for report in reports), reports


def test_address_sanitizer_sees_global_memory():
    done = run(emulator.build("selftest", sanitized=True), "global_overrun")
    assert done.returncode != RIGHT
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_the_seed_decides_the_order(selftest):
    """The same seed catches the same thread; another seed another one."""
    reports = [run(selftest, "outside_of_mask", seed).stderr.partition("  in kernel")[0] for seed in (0, 0, 1, 2, 3)]
    assert reports[0] == reports[1]
    assert len(set(reports)) > 1
