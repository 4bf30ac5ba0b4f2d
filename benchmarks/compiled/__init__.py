"""What compiled kernels show without a GPU: registers, spills, shared memory, instructions."""
