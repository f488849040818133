"""Exact rewrites, graph to graph, that make heads visible to the analysis."""
