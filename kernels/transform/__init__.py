"""What a program does to the logits element by element: the chain, its derivative, generated functions."""
