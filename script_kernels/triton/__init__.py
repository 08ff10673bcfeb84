"""Triton kernels, one module per op; imported only when an op meets a CUDA tensor."""
