"""Reports: what the pass did with each head, for people and programs."""
