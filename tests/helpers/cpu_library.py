"""The compiled code for a CPU's tiled form, as tests want it."""

import shutil

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
