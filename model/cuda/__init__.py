"""The CUDA backend on Triton kernels."""
