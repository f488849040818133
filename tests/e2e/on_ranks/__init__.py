"""Training programs of real packages on two gloo ranks, as their documentation arranges them. None names fusedhead."""
