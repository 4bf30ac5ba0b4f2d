"""Types of command line arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """A finite number above 0, whole where `kind` is int."""

    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    convert.__name__ = "number" if kind is float else "whole number"  # argparse names it where it is none
    return convert


def device(text: str) -> torch.device:
    """A CPU or a CUDA device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this PyTorch sees no CUDA device")
    return found


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
