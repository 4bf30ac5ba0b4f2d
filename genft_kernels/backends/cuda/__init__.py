"""The operations by the CUDA C++ kernels of `csrc/`."""
