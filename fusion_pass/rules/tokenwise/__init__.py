"""The second reading of the op families: their form on [N, ...], one token at a time. Same file names as the first."""
