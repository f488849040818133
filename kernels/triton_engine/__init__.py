"""The engine for NVIDIA GPUs: Triton sweeps and cuBLAS products."""
