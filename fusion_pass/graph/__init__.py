"""Services on fx graphs for every layer: nodes, tracing, memory, effects, grad modes, motion. Heads are unknown."""
