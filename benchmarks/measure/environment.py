"""Where a number comes from: the fields that every result row carries."""

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import genft_kernels
from genft_kernels.backends.card import processor

REPOSITORY = Path(__file__).parents[2]
_PACKAGES = ("triton", "peft", "unsloth", "nemo-automodel", "transformers")


def device_name(device: torch.device) -> str:
    """The device as its maker calls it; a CPU with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, str | int | None]:
    """Device, versions, commit and a digest of what was measured."""
    fields = {
        "device": device_name(device), "commit": _commit(), "sources": sources(),
        "genft_kernels": genft_kernels.__version__, "python": platform.python_version(), "torch": torch.__version__,
        **{package.replace("-", "_"): version(package) for package in _PACKAGES},
    }  # fmt: skip
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return fields | {"cuda": torch.version.cuda, "capability": f"sm_{major}{minor}"}
    amx = torch.cpu._is_amx_tile_supported()
    return fields | {"cpu_capability": torch.backends.cpu.get_cpu_capability() + (" with AMX" if amx else "")}


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def sources() -> str:
    """Digest of the package, its CUDA sources and the benchmarks: the same wherever they are, a repository or not."""
    digest = hashlib.sha256()
    files = [path for folder in ("genft_kernels", "csrc", "benchmarks") for path in (REPOSITORY / folder).rglob("*")]
    for path in sorted(path for path in files if path.suffix in (".py", ".h", ".cuh", ".cu", ".cpp", ".txt")):
        digest.update(str(path.relative_to(REPOSITORY)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """HEAD, with a plus where files other than results differ from it; None outside a repository."""
    generated = (":!benchmarks/results", ":!README.md", ":!docs/results.md")
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", ".", *generated) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=REPOSITORY, stderr=subprocess.DEVNULL, text=True).strip()
