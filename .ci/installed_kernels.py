"""Run in an empty environment: the CUDA kernels of the installed package load, be they compiled now or prebuilt."""

import sys

from genft_kernels.backends import _jit

expected = sys.argv[1]  # "cached" or "prebuilt"
kernels = _jit.load()
assert "site-packages" in _jit.__file__, f"not the installed package: {_jit.__file__}"
assert f"CUDA kernels: {expected} " in _jit.state(), _jit.state()
assert kernels.error_string(0) == "no error"
print(f"installed kernels: {expected}, loaded")
