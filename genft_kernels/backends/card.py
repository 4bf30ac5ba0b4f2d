"""Findings about a card that are kept: JSON files beside compiled code, named by all that they follow from.

Among that are this package's sources: after a change of them everything is found out anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from .._version import __version__

_PACKAGE = Path(__file__).parents[1]
_CODE = (".py", ".cu", ".cuh", ".h", ".cpp", ".txt")


@functools.cache
def identity(device: torch.device) -> dict[str, str | None]:
    """All that a measurement on a device follows from, but for the measured: card, driver, versions, sources."""
    of_cuda = device.type == "cuda"
    driver = Path("/proc/driver/nvidia/version")
    return {
        "card": torch.cuda.get_device_name(device) if of_cuda else processor(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if of_cuda else None,
        "driver": driver.read_text().splitlines()[0] if of_cuda and driver.exists() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "genft_kernels": __version__,
        "sources": _digest_of_sources(),
    }


def file(what: str, device: torch.device) -> Path:
    """The file of what is known under the name `what` of a device.

    Raises:
        OSError: there is no folder for it.
        BuildError: GENFT_CACHE_DIR is no folder's absolute path.
    """
    from .compiled import cache

    digest = hashlib.sha256(json.dumps(identity(device), sort_keys=True).encode()).hexdigest()[:24]
    return cache.cache_folder() / f"{what}-{digest}.json"


def read(path: Path) -> dict[str, Any]:
    """The object in a file; ValueError if it is damaged, or another user's."""
    try:
        if hasattr(os, "geteuid") and path.stat().st_uid not in (0, os.geteuid()):
            raise ValueError("it belongs to another user")
        content = json.loads(path.read_bytes())
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Put `content` in place of a file, of which nobody sees half; OSError if that cannot be."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as unfinished:
        json.dump(content, unfinished, indent=1)
    os.replace(unfinished.name, path)


def processor() -> str:
    """The CPU's model, as its maker calls it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(errors="replace").splitlines() if information.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


@functools.cache
def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for source in sorted(path for place in (_PACKAGE, _PACKAGE.parent / "csrc") for path in place.rglob("*.*")):
        if source.suffix in _CODE:
            digest.update(source.read_bytes())
    return digest.hexdigest()[:24]
