"""What the pass knows of tensors: logits and what is made of them, terminals, and the builder of new nodes."""
