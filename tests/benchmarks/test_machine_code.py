"""Readings of machine code: loops, their loads, operands that are overwritten."""

import pytest

from benchmarks.compiled import machine_code
from benchmarks.compiled.triton_report import faults


def code(*lines):
    """As nvdisasm prints it."""
    return "\n".join(
        f".{line}:" if line.startswith("L_x") else f"        /*0a00*/                   {line} ;" for line in lines
    )


LOOP = code(
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "L_x_1",
    "L_x_2",
    "LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64]",
    "@P1 LDG.E R7, desc[UR4][R2.64]",
    "HMMA.16816.F32.BF16 R8, R4, R12, R8",
    "@P0 BRA `(.L_x_2)",
    "FADD R1, R1, R1",
    "BRA `(.L_x_1)",
    "BRA `(.L_x_3)",
    "L_x_3",
    "EXIT",
)


def test_hot_loop_is_the_innermost_with_matrix_instructions():
    assert machine_code.hot_loops(LOOP) == [{"instructions": 3, "matrix": 1, "loads": 1}]
    assert machine_code.hot_loops(LOOP.replace("@P1 LDG.E R7", "@P1 LDS R7"))[0]["loads"] == 0
    assert machine_code.hot_loops(LOOP.replace("HMMA", "FFMA")) == []


SPILLS = code(
    "STL.64 [R1+0x8], R2",
    "L_x_1",
    "FADD R1, R1, R1",
    "L_x_2",
    "FFMA R1, R1, R1",
    "@P0 BRA `(.L_x_2)",
    "@!P1 BRA `(.L_x_1)",
    "LDL.LU R99, [R1+0x8]",
    "@P0 BRA `(.L_x_3)",
    "FADD R2, R2, R2",
    "L_x_3",
    "EXIT",
)


def test_spills_in_loops_are_told_from_those_that_a_program_makes_once():
    assert machine_code.spills(SPILLS) == {"instructions": 9, "spills": 2, "spills_in_loops": 0}
    for once, of_loop in (("FADD R1, R1, R1", "STL [R1], R5"), ("FFMA R1, R1, R1", "@P2 LDL.64 R6, [R1+0x4]")):
        found = machine_code.spills(SPILLS.replace(once, of_loop))
        assert found == {"instructions": 9, "spills": 3, "spills_in_loops": 1}
    assert machine_code.spills(SPILLS.replace("FADD R2, R2, R2", "LDL R2, [R1]"))["spills_in_loops"] == 0
    assert machine_code.spills(LOOP)["spills"] == 0  # LDGSTS and LDG are none


@pytest.mark.parametrize(
    "write, found",
    [
        ("IADD3 R43, R1, R2, RZ", True),
        ("@P0 MOV R40, R1", True),
        ("LDS.128 R40, [R3]", True),
        ("LDS.64 R39, [R3]", True),
        ("LDS R39, [R3]", False),
        ("IADD3 R44, R40, R41, RZ", False),
        ("STS [R40], R41", False),
    ],
)
def test_operand_of_a_wgmma_that_is_overwritten_before_its_wait_is_found(write, found):
    wgmma, wait = "HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR8].tnspB, R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert machine_code.overwritten_operands(code(wgmma, write, wait)) == (
        [write.removeprefix("@P0 ")] if found else []
    )
    assert machine_code.overwritten_operands(code(wgmma, wait, write)) == []
    from_memory = wgmma.replace("R40, gdesc[UR8]", "gdesc[UR8]")
    assert machine_code.overwritten_operands(code(from_memory, write, wait)) == []


GOOD = dict(
    kernel="contract", target="sm_90", dtype="bfloat16", k=32, shared=1000, matrix={"HGMMA": 4}, notes=[],
    instructions=1000, spills=10, spills_in_loops=0, overwritten=[],
    hot_loops=[{"instructions": 90, "matrix": 4, "loads": 0}], registers=128, num_warps=8,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(spills_in_loops=1), "1 spill instructions in a loop"),
        (dict(dtype="float32", spills_in_loops=3), "3 spill instructions in a loop"),
        (dict(spills=11), "11 spill instructions of 1000"),
        (dict(target="sm_89", shared=101_377), "more than 101376"),
        (dict(notes=["C7515"]), "ptxas notes C7515"),
        (dict(overwritten=["MOV R40, R1"]), "operand is overwritten by MOV R40, R1"),
        (dict(hot_loops=[{"instructions": 90, "matrix": 4, "loads": 1}]), "synchronous loads in a hot loop"),
        (dict(matrix={"HMMA": 4}), "no wgmma"),
        (dict(kernel="thin_product", registers=129), "129 registers: no room for 2 programs at once"),
        (dict(registers=255, num_warps=16), "255 registers: no room for 1 programs at once"),
    ],
)
def test_report_names_the_fault(change, words):
    assert list(faults(GOOD)) == list(faults(GOOD | dict(dtype="float32", spills_in_loops=2))) == []
    (fault,) = faults(GOOD | change)
    assert words in fault
