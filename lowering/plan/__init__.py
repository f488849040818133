"""Which engine computes a head, by which algorithm, in which windows."""
