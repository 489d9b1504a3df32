"""One pass over all collectives at every size from 1 to 8."""

from __future__ import annotations

import numpy as np
import torch
from known import assert_same, own, reduced, values

import mpidl

WITH_OTHERS = True
RANKS = (8,)
SIZES = range(1, 9)


def test_all_collectives(comm: mpidl.Communicator) -> None:
    size, rank = comm.size, comm.rank
    count = 4 * size
    for kind, dtype in (("numpy", "float64"), ("torch", "bfloat16"), ("torch", "int32")):
        x = own(kind, dtype, rank, count)
        whole = reduced("sum", [values(r, count, dtype) for r in range(size)], kind, dtype)
        assert_same(comm.allreduce(x), whole)
        assert_same(comm.iallreduce(x).wait(), whole)
        assert_same(comm.reduce_scatter(x), whole[4 * rank : 4 * rank + 4])
        result = comm.reduce(x, root=size - 1)
        if rank == size - 1:
            assert_same(result, whole)
        else:
            assert result is None
        assert_same(comm.allgather(x)[size // 2], own(kind, dtype, size // 2, count))
        exchanged = comm.alltoall(x)
        for r in range(size):
            assert_same(exchanged[4 * r : 4 * r + 4], own(kind, dtype, r, count)[4 * rank : 4 * rank + 4])
        assert_same(comm.broadcast(x, root=size - 1), own(kind, dtype, size - 1, count))
    comm.barrier()


def test_means(comm: mpidl.Communicator) -> None:
    assert_same(comm.allreduce(np.array([float(comm.rank)]), op="mean"), np.array([(comm.size - 1) / 2]))
    assert_same(comm.allreduce(torch.tensor([float(comm.rank)]), op="mean"), torch.tensor([(comm.size - 1) / 2]))
