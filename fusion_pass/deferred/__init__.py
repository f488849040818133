"""Logits that a compiled graph returns without building them: a tensor that knows what it would be made of.

| a graph returns logits, another takes them  | `handing_out`, `inputs`                              |
| the tensor, and what it knows               | `tensor`, `knowledge`, `program`                     |
| a call on it: table, record, or answer      | `calls`, `tables`, `recording`, `request`            |
| what the call amounts to, read as a graph   | `draft`, `reading`, `token_by_token`, `outcome`      |
| numbers that are known already              | `sweeps`, `picks`                                    |

The pass's rules read calls here as they read a Dynamo graph. No rule and no kernel may know this package.
"""
