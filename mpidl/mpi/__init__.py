"""MPI started and ended, ranks and nodes, waits, who has died, the node's shared memory; the only user of mpi4py."""
