"""The intermediate representation: logits and values made of them, terminals, and the builder of new nodes."""
