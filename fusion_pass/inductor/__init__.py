"""Inductor's settings, and this package's passes on Inductor's graphs."""
