"""Analysis: the relation of each tensor of a graph to a head. Nothing here edits a graph or decides what is fused."""
