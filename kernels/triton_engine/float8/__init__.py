"""The single pass whose gradient products are float8: the tail of the softmax rounded, large entries exact."""
