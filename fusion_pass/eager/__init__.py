"""Heads of programs that compile nothing: eager projections that hand out deferred logits."""
