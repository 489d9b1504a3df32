"""A program with many communicators whose rank 0 leaves late: their goodbyes are more than a network may hold back."""

from __future__ import annotations

import time

from mpi4py import MPI

import mpidl

# libfabric's tcp, under MPICH, keeps 64 messages of a peer that nobody asked for. Open MPI takes long to make so many.
MANY = 60 if "MPICH" in MPI.Get_library_version() else 8

world = mpidl.world()
kept = [mpidl.Communicator(MPI.COMM_WORLD) for _ in range(MANY)]
world.barrier()
if world.rank == 0:
    time.sleep(1)
print("leaves", flush=True)
