"""The CPU backend on compiled kernels."""
