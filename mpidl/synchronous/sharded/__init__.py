"""The step whose weights stand once per node and whose optimiser state is divided over the ranks."""
