"""Whether tensors that should be alike on all ranks are: a checksum of each first, then the first one that differs."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpidl.errors import MismatchError
from mpidl.mpi.topology import Topology
from mpidl.optim import transport

_CAUSES = (
    "some rank has written to it by itself: load_state_dict() or an initialisation on one rank only, "
    "Embedding(max_norm=...), optimizer.eval() on one rank, random numbers in step(), or memory that failed"
)


def find_difference(
    ranks: Topology, tensors: Mapping[str, torch.Tensor], what: str, among: Sequence[int] | None = None
) -> MismatchError | None:
    """Returns an error, alike on all ranks, if some tensor's bits differ between ranks; a collective.

    Args:
        ranks: who takes part.
        tensors: by name; alike in names, shapes and dtypes on all ranks.
        what: the call, for messages.
        among: the ranks whose tensors are compared; None: all ranks.
    """
    compared = list(range(ranks.size)) if among is None else list(among)
    mine = np.array([transport.checksum(tensor) for tensor in tensors.values()], np.int64)
    whole = ranks.gather_words(np.array([zlib.crc32(mine.tobytes()), mine.size], np.int64), what)[compared]
    if (whole == whole[0]).all():
        return None
    everyone = ranks.gather_words(mine, what)[compared]
    differ = np.flatnonzero((everyone != everyone[0]).any(axis=0))
    if not differ.size:
        return None
    name = list(tensors)[differ[0]]
    sums = dict(zip(compared, everyone[:, differ[0]].tolist(), strict=True))
    usual = Counter(sums.values()).most_common(1)[0][0]
    alike = [rank for rank, found in sums.items() if found == usual]
    distances = _distances(ranks, tensors[name], alike[0], what)
    others = [f"rank {rank} by up to {distances[rank]:g}" for rank, found in sums.items() if found != usual]
    more = f", and so do {differ.size - 1} more of {mine.size}" if differ.size > 1 else ""
    return MismatchError(
        f"{what}: {name} differs between ranks, which should hold equal bits: "
        f"{', '.join(others)} from rank{'s' if len(alike) > 1 else ''} {', '.join(map(str, alike))}{more}; {_CAUSES}"
    )


def _distances(ranks: Topology, tensor: torch.Tensor, root: int, what: str) -> list[float]:
    """Returns, for each rank, the largest difference between an element of its tensor and of root's; a collective."""
    if transport.is_sparse(tensor):
        return [float("nan")] * ranks.size
    mine = tensor.detach().clone(memory_format=torch.contiguous_format)
    theirs = mine.clone()
    transport.broadcast(ranks, [theirs], root, what)
    wide = torch.complex128 if mine.is_complex() else torch.float64
    apart = (mine.to(wide) - theirs.to(wide)).abs()
    distance = float(apart.max()) if apart.numel() else 0.0
    found: list[float] = ranks.gather_words(np.array([distance], np.float64), what)[:, 0].tolist()
    return found
