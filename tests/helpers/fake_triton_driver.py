"""A driver for Triton that launches nothing: what the host does for a launch, on a machine without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Within the context kernels are not compiled, and each launch leaves its kernel's name."""
    names: list[str] = []
    here = object()  # a device of this context's own, whose kernels are nobody else's

    def compiled(self, key, signature, device, *others):
        name = self.__name__.lstrip("_")
        kernel = SimpleNamespace(
            run=lambda *arguments: names.append(name), launch_metadata=lambda *arguments: None, function=0,
            packed_metadata=0,
        )  # fmt: skip
        self.device_caches[device][0][key] = kernel
        return kernel

    fake = SimpleNamespace(
        get_current_device=lambda: here, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )  # fmt: skip
    with mock.patch.object(JITFunction, "_do_compile", compiled), mock.patch.object(driver, "_active", fake):
        yield names
