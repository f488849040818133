"""The command line, and the switches that replace Inductor by fusedhead."""
