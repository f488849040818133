"""The rewrite: replaces fused sites by op calls."""
