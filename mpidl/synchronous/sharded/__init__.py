"""The sharded step: one copy of the weights per node, and optimiser state divided over the ranks."""
