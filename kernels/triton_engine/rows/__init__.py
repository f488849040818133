"""Row kernels: work on rows and labels that needs no GEMM."""
