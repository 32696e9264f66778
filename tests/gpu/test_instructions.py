"""The count of machine instructions, on stored text of cuobjdump, and the comparison with limits and records.

loops.sass is what nvcc 13.0 makes of this, without the encodings:

    __global__ void streamed(const float4* x, float4* y, int n) {
      float sum = 0;
    #pragma unroll 1
      for (int i = threadIdx.x; i + 32 < n; i += 64) {
        const float4 a = __ldcg(x + i), b = __ldcg(x + i + 32);
        sum += (a.x + a.y) + (a.z + a.w) + (b.x + b.y) + (b.z + b.w);
      }
    #pragma unroll 1
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    #pragma unroll 1
      for (int i = threadIdx.x; i < n; i += 32) {
        const float4 a = x[i];
        y[i] = make_float4(a.x * sum, a.y * sum, a.z * sum, a.w * sum);
      }
    }
"""

from pathlib import Path

import instructions
import limits
import pytest
from instructions import Count
from resources import Usage, blocks_that_fit

pytestmark = pytest.mark.devices("cpu")


@pytest.fixture
def streamed():
    kernels = instructions.parse(Path(__file__).with_name("loops.sass").read_text())
    assert list(kernels) == ["_Z8streamedPK6float4PS_i"]
    return kernels["_Z8streamedPK6float4PS_i"]


def program(*lines):
    """Kernel `k`: an instruction a line."""
    text = "Function : k\n" + "".join(f"/*{16 * i:04x}*/  {line} ;\n" for i, line in enumerate(lines))
    return instructions.parse(text)["k"]


def test_every_instruction_is_read(streamed):
    assert instructions.count(streamed) == Count(67, loads=3, stores=1)  # and 13 NOP
    assert len(streamed) == 80
    assert streamed[8] == (0x80, "P0", "BRA", "0x1f0")


def test_loops(streamed):
    """The branch to itself behind the end is not reached."""
    assert [sorted(body) for body in instructions.loops(streamed)] == [[0xF0], [0x210], [0x300]]
    assert instructions.main_loop(streamed, stores=False) == Count(16, loads=2, stores=0)
    assert instructions.main_loop(streamed, stores=True) == Count(17, loads=1, stores=1)


def test_the_innermost_loop_of_most_loads():
    code = program(
        "LDG.E.EF.128 R0, [R2]",  # 0x00: of the outer loop
        "LDG.E.128.CONSTANT R4, [R2]",  # 0x10: the inner one, of a load
        "FADD R0, R0, R4",
        "@P0 BRA 0x10",
        "LDG.E.EF.128 R0, [R2]",  # 0x40: the other, of two loads; its branch out and back is a part of it
        "LDG.E.128 R0, [R2]",
        "@P2 BRA 0x80",
        "@P1 BRA 0x40",
        "LDG.E.64 R0, [R2]",  # 0x80
        "FADD R0, R0, R0",
        "@P3 BRA 0x40",
        "@P1 BRA 0x0",
        "EXIT",
    )
    assert instructions.main_loop(code, stores=False) == Count(7, loads=2, stores=0)
    assert instructions.main_loop(code, stores=True) is None


def test_code_behind_the_end_that_jumps_back_is_no_loop():
    code = program(
        "@P0 BRA 0x60",
        "LDG.E.128 R0, [R2]",
        "FADD R0, R0, R0",
        "EXIT",
        "BRA 0x40",
        "NOP",
        "SHFL.BFLY R0, R1",
        "BRA 0x10",
    )
    assert instructions.loops(code) == []


@pytest.mark.parametrize("guard", ["", "@P0 "])
def test_a_switch(guard):
    """Its cases are what nothing else reaches; here each ends in the loop's last part."""
    code = program(
        "LDG.E.128 R0, [R2]",  # 0x00
        f"{guard}BRX R2 -0x20",
        "FADD R0, R0, R0",
        "BRA 0x60",
        "FMUL R0, R0, R0",  # 0x40
        "BRA 0x60",
        "@P1 BRA 0x0",  # 0x60
        "EXIT",
    )
    assert instructions.main_loop(code, stores=False) == Count(7, loads=1, stores=0)


def test_a_branch_that_is_not_known_is_not_passed_over():
    with pytest.raises(ValueError, match="can't follow JMX"):
        instructions.loops(program("JMX R2", "EXIT"))


@pytest.mark.parametrize(
    ("registers", "threads", "blocks"),
    [(64, 512, 2), (40, 512, 3), (32, 512, 4), (64, 1024, 1), (32, 1024, 2), (72, 128, 7), (16, 32, 32), (86, 512, 1)],
)
def test_blocks_that_fit(registers, threads, blocks):
    assert blocks_that_fit(registers, threads) == blocks


# ---- limits and records ----------------------------------------------------------------------------------------------


@pytest.fixture
def limit(monkeypatch, tmp_path):
    """Of the stored kernel: 2 elements, so to say, in 16 bytes, and 16 / 4 instructions for each."""
    limit = limits.Limit(r"^streamed<float>$", "forward", 4, 32, 512, elements=2)
    monkeypatch.setattr(limits, "LIMITS", [limit])
    monkeypatch.setattr(limits, "RECORD", tmp_path / "instructions.csv")
    return limit


NAME = "streamed<float>"
USAGE = Usage(32, 0, 0)


def test_the_record_is_what_was_counted(limit, streamed):
    costs, wrong = limits.check({NAME: streamed}, {NAME: USAGE}, None)
    assert costs == [(NAME, "forward", 4.0, 32, 0, 4)]
    assert wrong == []
    assert "no record" in limits.check({NAME: streamed}, {NAME: USAGE}, limits.read_record())[1][0]
    limits.write_record(costs)
    assert limits.read_record() == {(NAME, "forward"): costs[0]}
    assert limits.check({NAME: streamed}, {NAME: USAGE}, limits.read_record()) == (costs, [])
    assert f"| `{NAME}` | forward | 4.0 | 32 | 0 | 4 |" in limits.markdown(costs)


@pytest.mark.parametrize(
    ("changes", "usage", "recorded", "words"),
    [
        ({"instructions": 3.9}, USAGE, {}, "4.0 instructions an element; at most 3.9 are wanted"),
        ({}, USAGE, {"instructions": 3.6}, "4.0 instructions an element; 3.6 were recorded"),
        ({}, Usage(33, 0, 0), {"blocks": 3}, "33 registers; at most 32 are wanted"),
        ({}, USAGE, {"blocks": 5}, "4 blocks fit on a multiprocessor; 5 were recorded"),
        ({}, Usage(32, 8, 0), {}, "a stack frame of 8 B"),
        ({"what": "backward", "instructions": 9}, USAGE, {}, None),
        ({"chunks": 8, "what": "fused"}, USAGE, {}, "4.2 instructions an element; at most 4 are wanted"),
        ({"kernel": "^other"}, USAGE, {}, "no kernel is called ^other"),
    ],
)
def test_what_is_said(limit, streamed, monkeypatch, changes, usage, recorded, words):
    limit = limit._replace(**changes)
    monkeypatch.setattr(limits, "LIMITS", [limit])
    record = limits.Cost(NAME, limit.what, 4.0, 32, 0, 4)._replace(**recorded)
    if limit.what == "backward":
        record = record._replace(instructions=8.5)
    wrong = limits.check({NAME: streamed}, {NAME: usage}, {(NAME, limit.what): record})[1]
    assert len(wrong) == (words is not None), wrong
    assert words is None or words in wrong[0]


def test_a_kernel_without_the_loop_is_said(limit):
    code = program("LDG.E.128 R0, [R2]", "EXIT")
    assert limits.check({NAME: code}, {NAME: USAGE}, {}) == ([], [f"{NAME} has no loop that is its forward"])


def test_the_limits_are_for_the_plain_kernels():
    plain = "streamed_rows<CrossEntropyOp<__nv_bfloat16, float, (Kind)0>, 8, (Scope)1>"
    assert limits.has_limit(plain)
    assert not limits.has_limit(plain.replace("(Kind)0", "(Kind)1"))
    assert not limits.has_limit(plain.replace("__nv_bfloat16", "__half"))
