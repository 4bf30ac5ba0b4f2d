"""The operations in plain PyTorch."""
