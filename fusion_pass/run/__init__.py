"""The command line, and the switches that put fusedhead in the place of Inductor."""
