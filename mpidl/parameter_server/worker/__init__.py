"""The optimisers' common part: local steps, the exchange with the center, its statistics."""
