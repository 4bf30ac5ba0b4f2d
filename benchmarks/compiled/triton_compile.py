"""Compile the Triton kernels ahead of time, as the package launches them, on a machine without a GPU.

The backend's own host functions run on CPU tensors while `recording` takes down each launch instead of making it, so
a report covers the configurations that ship and nothing is listed twice. Registers, spills and matrix instructions
are read off the machine code with the tools inside the Triton wheel.
"""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.compiled import machine_code

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one block may have, in bytes.
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched: types, specialised values and compiler options."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]  # indices of arguments that are multiples of 16
    options: tuple[tuple[str, object], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__.lstrip("_")

    def compile(self, target: str):
        attributes = {(index,): [["tt.divisibility", 16]] for index in self.divisible}
        source = ASTSource(self.kernel, dict(self.signature), constexprs=dict(self.constants), attrs=attributes)
        return triton.compile(source, target=TARGETS[target], options=dict(self.options))


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the context launches are taken down once each, and nothing runs."""
    launches: list[Launch] = []

    def record(self, *args, grid, warmup, **kwargs):
        names = self.arg_names
        values = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
        launch = _launch(self, [values[name] for name in names], kwargs)
        if launch not in launches:
            launches.append(launch)

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def _launch(kernel: JITFunction, values: list, options: dict) -> Launch:
    """Specialise as Triton's launcher does: None and 1 become constants, multiples of 16 are noted."""
    signature, constants, divisible = [], [], []
    for index, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        integer = isinstance(value, int) and not isinstance(value, bool)
        specialised = integer and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((parameter.name, _TYPES[value.dtype]))
        elif integer:
            signature.append((parameter.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
        else:
            signature.append((parameter.name, "fp32"))
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value if specialised else 1
        if number % 16 == 0 and not parameter.do_not_specialize_on_alignment:
            divisible.append(index)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), tuple(sorted(options.items())))


def report(launch: Launch, target: str) -> dict:
    """The resources of the compiled kernel: registers, spills, shared bytes, and its matrix instructions."""
    compiled = launch.compile(target)
    row = {"kernel": launch.name, "target": target, "shared": compiled.metadata.shared}
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
        return row | {
            "registers": numbers["vgpr_count"],
            "instructions": 0,
            "spills": numbers["vgpr_spill_count"],
            "spills_in_loops": numbers["vgpr_spill_count"],  # it is not told where they are
            "matrix": {"mfma": len(re.findall(r"\bv_mfma", assembly))},
        }
    assembler = pathlib.Path(get_ptxas(TARGETS[target].arch).path)  # the one of the wheel's two that Triton takes
    architecture = f"{target}a" if target in ("sm_90", "sm_100") else target  # with that generation's own, as wgmma
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([_TOOLS / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        code = subprocess.check_output([_TOOLS / "nvdisasm", "-c", file.name], text=True)
    return row | {
        "hot_loops": machine_code.hot_loops(code),
        "notes": machine_code.notes(assembler, compiled.asm["ptx"], architecture),
        "overwritten": machine_code.overwritten_operands(code),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        **machine_code.spills(code),
        "matrix": {
            name: count
            for name in ("HGMMA", "HMMA", "UTCHMMA")
            if (count := len(re.findall(rf"\b{name}", code)))
        },
    }  # fmt: skip
