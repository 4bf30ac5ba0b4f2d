"""Faults that machine code shows, and results not always: what nvdisasm and ptxas say of a compiled kernel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LABEL = re.compile(r"^\s*\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_BRANCH = re.compile(r"\(\.(L_x_\d+)\)")
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "QGMMA")
_SPILL = ("STL", "LDL")  # to and from memory of a thread's own, which registers have no room for


def notes(ptxas: Path, ptx: str, target: str) -> list[str]:
    """The notes C75xx of ptxas, as C7515 for wgmma that wait for each other, each once."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"\bC75\d\d\b", done.stdout + done.stderr)))


def instructions(code: str) -> Iterator[tuple[str, str]]:
    """(opcode, operands) of each instruction, and ("label", its name) where something may branch to."""
    for line in code.splitlines():
        if label := _LABEL.match(line):
            yield "label", label[1]
        elif instruction := _INSTRUCTION.search(line):
            yield instruction[1], instruction[2]


def _loops(listed: list[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    """Places of each loop's label and of the branch back to it, in a list of instructions."""
    places = {operands: index for index, (opcode, operands) in enumerate(listed) if opcode == "label"}
    for index, (opcode, operands) in enumerate(listed):
        if opcode.startswith("BRA") and (target := _BRANCH.search(operands)):
            begin = places.get(target[1], index)
            if begin < index - 1:
                yield begin, index


def innermost_loops(code: str) -> Iterator[list[tuple[str, str]]]:
    """The instructions of each loop that has no other in it."""
    listed = list(instructions(code))
    found = list(_loops(listed))
    for begin, end in found:
        if not any(begin <= other and last <= end and (other, last) != (begin, end) for other, last in found):
            yield [each for each in listed[begin:end] if each[0] != "label"]


def hot_loops(code: str) -> list[dict[str, int]]:
    """For each innermost loop with matrix instructions: how many it has, of how many, and its synchronous loads."""
    rows = []
    for body in innermost_loops(code):
        opcodes = [opcode for opcode, _ in body]
        if matrix := sum(opcode.startswith(_MATRIX) for opcode in opcodes):
            loads = sum(opcode.startswith("LDG.") for opcode in opcodes)
            rows.append({"instructions": len(body), "matrix": matrix, "loads": loads})
    return rows


def spills(code: str) -> dict[str, int]:
    """How many instructions there are, how many of them spill, and how many of those some loop repeats."""
    listed = list(instructions(code))
    found, places = list(_loops(listed)), [n for n, (opcode, _) in enumerate(listed) if opcode.startswith(_SPILL)]
    return {
        "instructions": sum(opcode != "label" for opcode, _ in listed),
        "spills": len(places),
        "spills_in_loops": sum(any(begin < place < end for begin, end in found) for place in places),
    }


def overwritten_operands(code: str) -> list[str]:
    """Instructions that write a register which a wgmma before them may still read as its left operand.

    It reads until the next wait; ptxas before 13.3 has been seen to forget that.
    """
    busy: set[int] = set()
    found = []
    for opcode, operands in instructions(code):
        if opcode == "label" or opcode.startswith(("WARPGROUP.DEPBAR", "BRA", "EXIT")):
            busy.clear()
        elif opcode.startswith("HGMMA"):
            left = re.match(r"R\d+, R(\d+),", operands)
            busy |= set(range(int(left[1]), int(left[1]) + 4)) if left else set()
        elif busy & _written(opcode, operands):
            found.append(f"{opcode} {operands}")
    return found


def _written(opcode: str, operands: str) -> set[int]:
    if opcode.startswith(("ST", "RED", "BAR", "LDGSTS", "LDGDEPBAR", "DEPBAR", "WARPSYNC")):
        return set()
    first = re.match(r"(?:U?P\w+, )?R(\d+)\b", operands)
    if first is None:
        return set()
    width = 4 if ".128" in opcode or ".x4" in operands or ".M88.4" in opcode or ".MT88.4" in opcode else 1
    width = 2 if width == 1 and (".64" in opcode or ".WIDE" in opcode) else width
    return set(range(int(first[1]), int(first[1]) + width))
