"""Kernels over rows and labels, without a product."""
