"""The asynchronous parameter server: workers commit to a center variable and pull it, each at its own speed.

The center lies, shard by shard, in memory that other ranks can reach: shared memory within a node, active messages or
RMA windows between nodes, on the workers themselves or on dedicated servers. `center` holds it and counts commits;
`worker` is the optimiser that takes local steps and exchanges with the center; here is one file per algorithm.
"""
