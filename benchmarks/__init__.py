"""Measurements of the package beside others; nothing in it imports them."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler warns of memory that is older than itself
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from installed packages
