"""Collectives between nodes: each rank of a node carries one slice over the network; one algorithm, one file."""
