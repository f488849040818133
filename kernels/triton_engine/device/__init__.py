"""Device functions: the functions that kernels call, inlined at compile time."""
