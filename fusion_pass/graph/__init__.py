"""What every layer asks of an fx graph: nodes, tracing, memory, effects, grad modes, motion. Heads are unknown."""
