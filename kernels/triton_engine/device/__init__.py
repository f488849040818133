"""Functions that kernels call, unrolled at compile time."""
