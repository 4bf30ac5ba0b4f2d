"""Names of the backends, and the dtypes that those of kernels compute in."""

import torch

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_BACKENDS = ("triton", "cuda")  # in the order in which "auto" asks them
OPERATION_BACKENDS = ("eager", *KERNEL_BACKENDS)
BACKENDS = ("auto", *OPERATION_BACKENDS, "reference")
