"""Measurements of the package beside others; nothing in it imports them."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler warns of memory that is older than itself
