"""`python -m genft_kernels`: the environment, the backends, and why each is or is not used."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from . import __version__, backends
from .backends.cuda import extension
from .backends.eager import dropout as cpu_dropout

OPTIONAL_PACKAGES = ("safetensors", "triton", "transformers", "peft", "numpy")


def main() -> None:
    """Print a report to standard output."""
    argparse.ArgumentParser(prog="python -m genft_kernels", description=__doc__).parse_args()
    print(f"genft_kernels {__version__}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch {torch.__version__}, CUDA build: {torch.version.cuda or 'no'}, {torch.get_num_threads()} CPU threads")
    for package in OPTIONAL_PACKAGES:
        print(f"{package} {_version(package)}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}")
    if not torch.cuda.is_available():
        print("GPU: none that this torch can use")
    print(backends.explain())
    print(cpu_dropout.state())
    print(extension.state())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
