"""Persistent kernels that compute a product tile by tile and never store a logit."""
