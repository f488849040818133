"""Inductor's settings, and passes on the graphs that it is about to compile."""
