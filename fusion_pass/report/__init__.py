"""What became of each head, for people. No pass reads it."""
