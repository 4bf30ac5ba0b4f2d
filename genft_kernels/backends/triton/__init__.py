"""The operations by Triton kernels."""
