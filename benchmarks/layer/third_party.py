"""LoRA kernels of other packages, taken from their installed files; none of them is a dependency.

unsloth and NeMo Automodel import a whole training stack, which wants a GPU and many packages. The few functions
needed are compiled from their source files by themselves, unchanged, with stand-ins for what only quantised weights
use. Whatever fails here makes a provider unavailable, with the reason.
"""

import ast
import functools
import importlib
import importlib.util
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# Where a function or class of each name is defined, below the package's folder.
_UNSLOTH = {
    "kernels/utils.py": ("addmm_", "matmul_lora"),
    "kernels/fast_lora.py": (
        "LoRA_QKV", "LoRA_W", "_add_lora_dX", "_dropout_forward", "_dropout_replay", "_lora_bias_grad",
        "_matmul_lora_ext", "_may_overwrite_input",
    ),
}  # fmt: skip
_NEMO = {"components/_peft/lora.py": ("LoRATritonFunction",)}


class Missing(Exception):
    """A package or a definition in it that is not there; the message says which."""


@functools.cache
def unsloth() -> types.SimpleNamespace:
    """`LoRA_W` and `LoRA_QKV` for weights that are not quantised.

    Raises:
        Missing: not installed, or a version that keeps them elsewhere.
    """

    class Quantised:
        """No weight is of this type."""

    namespace = {
        "torch": torch, "torch_matmul": torch.matmul, "_is_compiling": torch.compiler.is_compiling,
        "torch_amp_custom_fwd": torch.amp.custom_fwd(device_type="cuda"),
        "torch_amp_custom_bwd": torch.amp.custom_bwd(device_type="cuda"),
        "fast_dequantize": lambda weight, quant_state, **options: weight, "_HAS_ADDMM_OP": False,
        "Float8Tensor": Quantised, "Int4QuantState": Quantised, "_is_packed_state": lambda quant_state: False,
        "_rms_layernorm": types.SimpleNamespace(_SAVE_OUTPUT=False),
    }  # fmt: skip
    return _definitions("unsloth", _UNSLOTH, namespace)


@functools.cache
def nemo() -> types.SimpleNamespace:
    """`LoRATritonFunction`; its Triton kernels come from the package's own module.

    Raises:
        Missing: not installed, or a version that keeps it elsewhere.
    """
    _folder("nemo_automodel")  # before an import that would fail with less to say
    try:
        kernels = importlib.import_module("nemo_automodel.components._peft.lora_kernel")
    except ImportError as error:
        raise Missing(f"nemo_automodel's kernels cannot be imported: {error}") from error
    return _definitions("nemo_automodel", _NEMO, {"torch": torch, "F": F, **vars(kernels)})


def _definitions(package: str, wanted: dict[str, tuple[str, ...]], namespace: dict[str, Any]) -> types.SimpleNamespace:
    """Functions and classes by name, run in `namespace` from the source files that `wanted` lists."""
    root = _folder(package)
    for file, names in wanted.items():
        path = root / file
        if not path.exists():
            raise Missing(f"this version of {package} has no {file}")
        body = ast.parse(path.read_text()).body
        found = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in names]
        missing = set(names) - {node.name for node in found}
        if missing:
            raise Missing(f"this version of {package} has no {', '.join(sorted(missing))} in {file}")
        exec(compile(ast.Module(found, type_ignores=[]), str(path), "exec"), namespace)
    return types.SimpleNamespace(**{name: namespace[name] for names in wanted.values() for name in names})


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"{package} is not installed (pip install --no-deps {package.replace('_', '-')})")
    return Path(spec.submodule_search_locations[0])
