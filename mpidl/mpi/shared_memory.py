"""Memory that the ranks of one node share: a file in /dev/shm that has no name any more once all have mapped it.

What lies in a segment, and how it is used, is decided in csrc/include/mpidl_node.h and `collectives`. MPI's own shared
windows are not used: a full /dev/shm ends a program that touches them by SIGBUS, where this says how much is needed;
and a mapping needs no collective to be given back.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mpidl.errors import SharedMemoryError
from mpidl.mpi import exit_protocol
from mpidl.mpi.agreement import gather_switch
from mpidl.mpi.topology import Topology
from mpidl.native import environment, library
from mpidl.native import node as _node

FOLDER = Path("/dev/shm")
SWITCH = environment.SHARED_MEMORY.name
_SMALL = 1 << 16  # bytes of data that travel beside the signature of a call
_ROUND = 1 << 19  # bytes that all ranks' slices of one phase have together
_PIECE = (1 << 14, 1 << 18)  # a slice has at least and at most so many bytes
_SPIN = 50_000  # nanoseconds, where every rank has a core of its own
_MOST_RANKS = 1024  # csrc/node/schedule.c


class Segment:
    """One segment over the ranks of a topology that are on this rank's node.

    Attributes:
        end: this rank's end of it, for `_node.advance`.
    """

    def __init__(self, ranks: Topology, memory: mmap.mmap, small: int, piece: int) -> None:
        self._memory = memory
        alone = ranks.ranks_on_my_cores() <= len(ranks.placement.cores[ranks.rank])
        node = ranks.node_ranks()
        address = int(library.ffi.cast("uintptr_t", library.ffi.from_buffer(memory)))
        spin = _SPIN if alone else 0
        self.end = _node.end(
            address, node.index(ranks.rank), len(node), small_nbytes=small, piece_nbytes=piece, spin=spin
        )


def all_want_it(ranks: Topology, wish: Callable[[], bool] | None = None) -> bool:
    """Whether memory is to be shared, alike on every rank; a collective of all of them.

    Args:
        ranks: anywhere.
        wish: whether this rank wants it; None for what MPIDL_SHARED_MEMORY says.

    Raises:
        ArgumentError: the setting of some rank makes no sense.
    """
    return bool(gather_switch(ranks, environment.SHARED_MEMORY, "agreeing to share memory", wish).all())


def make_segment(ranks: Topology, *, small: int = _SMALL, piece: int | None = None) -> Segment | None:
    """Makes a segment on every node; a collective of all of them.

    Args:
        ranks: anywhere, `possible`.
        small: see csrc/include/mpidl_node.h.
        piece: likewise; None for what suits the number of ranks.

    Returns:
        None if the ranks of some node do not see the same /dev/shm, which is said once.

    Raises:
        SharedMemoryError: there is not enough of it; alike on all ranks.
    """
    node = ranks.node_ranks()
    piece = piece or min(max(_ROUND // len(node) // 64 * 64, _PIECE[0]), _PIECE[1])
    memory = map_memory(ranks, _node.segment_nbytes(len(node), small, piece))
    return None if memory is None else Segment(ranks, memory, small, piece)


def map_memory(ranks: Topology, nbytes: int) -> mmap.mmap | None:
    """Maps memory, zero at first, that each node's ranks share; a collective of all of them.

    Args:
        ranks: anywhere.
        nbytes: how much; alike on the ranks of a node.

    Returns:
        None if the ranks of some node do not see the same /dev/shm, which is said once.

    Raises:
        SharedMemoryError: there is not enough of it; alike on all ranks.
    """
    first = ranks.node_ranks()[0]
    path = FOLDER / f"mpidl-{os.getpid()}-{secrets.token_hex(8)}"
    path = Path(ranks.gather_bytes(str(path).encode(), "making shared memory")[first].decode())
    memory, problem = None, ""
    try:
        if ranks.rank == first:
            memory, problem = _attempt(path, nbytes, ranks, os.O_CREAT | os.O_EXCL)
        problems = [text.decode() for text in ranks.gather_bytes(problem.encode(), "making shared memory")]
        if ranks.rank != first and not any(problems):
            memory, problem = _attempt(path, nbytes, ranks, 0)
        problems += [text.decode() for text in ranks.gather_bytes(problem.encode(), "making shared memory")]
    finally:
        if ranks.rank == first:
            path.unlink(missing_ok=True)
    found = next(filter(None, problems), "")
    if found == "unseen":
        if ranks.rank == 0:
            exit_protocol.say(
                "ranks of one node do not see the same /dev/shm: they exchange their data by MPI, more slowly"
            )
        return None
    if found:
        raise SharedMemoryError(found)
    return memory


def possible(ranks: Topology) -> bool:
    """Whether segments make sense: several ranks, not too many on one node; alike on every rank."""
    most = max(Counter(ranks.placement.nodes).values())
    return ranks.size > 1 and most <= _MOST_RANKS


def _attempt(path: Path, nbytes: int, ranks: Topology, flags: int) -> tuple[mmap.mmap | None, str]:
    """Maps the file, with this rank's part of its pages; or says why not."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    except FileNotFoundError:
        return None, "unseen"
    except OSError as error:
        return None, f"no shared memory can be made in {FOLDER}: {error.strerror}; {SWITCH}=0 does without"
    try:
        node = ranks.node_ranks()
        place = node.index(ranks.rank)
        start, stop = (nbytes * rank // len(node) for rank in (place, place + 1))
        if flags:
            os.ftruncate(file, nbytes)
        os.posix_fallocate(file, start, stop - start)  # on this rank's memory node; touching a page cannot fail later
        return mmap.mmap(file, nbytes), ""
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            return None, f"no shared memory can be made in {FOLDER}: {error.strerror}; {SWITCH}=0 does without"
        space = os.statvfs(FOLDER)
        return None, (
            f"{FOLDER} has no room for the {nbytes / 2**20:.1f} MiB that {len(node)} ranks of {ranks.name} share "
            f"(its size is {space.f_blocks * space.f_frsize / 2**20:.1f} MiB): give it more (mount -o remount,size=, "
            f"or docker run --shm-size), or set {SWITCH}=0 to do without, more slowly"
        )
    finally:
        os.close(file)
