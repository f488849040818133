"""What each tensor of a graph is, relative to a head. Nothing here edits a graph or decides what is fused."""
