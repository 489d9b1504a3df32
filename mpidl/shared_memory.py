"""Memory that the ranks of one node share: a file in /dev/shm that has no name any more once all have mapped it.

What lies in a segment, and how it is used, is decided in csrc/mpidl_node.h and `collectives`. MPI's own shared windows
are not used: a full /dev/shm ends a program that touches them by SIGBUS, where this says how much is needed; and a
mapping needs no collective to be given back.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from pathlib import Path

from mpidl import _native, _node, leaving
from mpidl.errors import ArgumentError, SharedMemoryError
from mpidl.topology import Topology

FOLDER = Path("/dev/shm")
SWITCH = "MPIDL_SHARED_MEMORY"
_SMALL = 1 << 16  # bytes that travel beside the words of a call
_ROUND = 1 << 19  # bytes that all ranks' slices of one turn have together
_PIECE = (1 << 14, 1 << 18)  # a slice has at least and at most so many bytes
_SPIN = 50_000  # nanoseconds, where every rank has a core of its own
_MOST_RANKS = 1024  # csrc/node.c


class Segment:
    """One segment over all ranks of a topology, which are on one node.

    Attributes:
        end: this rank's end of it, for `_node.advance`.
    """

    def __init__(self, ranks: Topology, memory: mmap.mmap, small: int, piece: int) -> None:
        self._memory = memory
        alone = ranks.ranks_on_my_cores() <= len(ranks.placement.cores[ranks.rank])
        address = int(_native.ffi.cast("uintptr_t", _native.ffi.from_buffer(memory)))
        spin = _SPIN if alone else 0
        self.end = _node.end(address, ranks.rank, ranks.size, small_nbytes=small, piece_nbytes=piece, spin=spin)


def wanted() -> bool:
    """Whether the user lets ranks share memory.

    Raises:
        ArgumentError: MPIDL_SHARED_MEMORY is neither 0 nor 1.
    """
    text = os.environ.get(SWITCH, "")
    if text not in ("", "0", "1"):
        raise ArgumentError(f"{SWITCH}={text!r}: expected 0 (ranks of a node exchange all data by MPI) or 1")
    return text != "0"


def make_segment(ranks: Topology, *, small: int = _SMALL, piece: int | None = None) -> Segment | None:
    """Makes a segment; a collective.

    Args:
        ranks: all on one node.
        small: see csrc/mpidl_node.h.
        piece: likewise; None for what suits the number of ranks.

    Returns:
        None if the ranks do not see the same /dev/shm, which is said once.

    Raises:
        SharedMemoryError: there is not enough of it; alike on all ranks.
    """
    piece = piece or min(max(_ROUND // ranks.size // 64 * 64, _PIECE[0]), _PIECE[1])
    memory = make_memory(ranks, _node.segment_nbytes(ranks.size, small, piece))
    return None if memory is None else Segment(ranks, memory, small, piece)


def make_memory(ranks: Topology, nbytes: int) -> mmap.mmap | None:
    """Maps memory that all of `ranks`, which are on one node, share; zeros at first; a collective.

    It needs no giving back: it is there for as long as somebody holds it, or what exports its buffer.

    Args:
        ranks: alike in `nbytes`.
        nbytes: above 0.

    Returns, Raises: as `make_segment`.
    """
    path = FOLDER / f"mpidl-{os.getpid()}-{secrets.token_hex(8)}"
    path = Path(ranks.gather_bytes(str(path).encode(), "making shared memory")[0].decode())
    memory, problem = None, ""
    try:
        if ranks.rank == 0:
            memory, problem = _attempt(path, nbytes, ranks, os.O_CREAT | os.O_EXCL)
        problem = ranks.gather_bytes(problem.encode(), "making shared memory")[0].decode() or problem
        if ranks.rank > 0 and not problem:
            memory, problem = _attempt(path, nbytes, ranks, 0)
        problems = [text.decode() for text in ranks.gather_bytes(problem.encode(), "making shared memory")]
    finally:
        if ranks.rank == 0:
            path.unlink(missing_ok=True)
    found = next(filter(None, problems), "")
    if found == "unseen":
        if ranks.rank == 0:
            leaving.say("ranks of one node do not see the same /dev/shm: they exchange their data by MPI, more slowly")
        return None
    if found:
        raise SharedMemoryError(found)
    assert memory is not None
    return memory


def possible(ranks: Topology) -> bool:
    """Whether a segment over all of `ranks` makes sense: several, not too many, on one node; alike on every rank."""
    return 1 < ranks.size <= _MOST_RANKS and len(set(ranks.placement.nodes)) == 1


def _attempt(path: Path, nbytes: int, ranks: Topology, flags: int) -> tuple[mmap.mmap | None, str]:
    """Maps the file, with this rank's part of its pages; or says why not."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    except FileNotFoundError:
        return None, "unseen"
    except OSError as error:
        return None, f"no shared memory can be made in {FOLDER}: {error.strerror}; {SWITCH}=0 does without"
    try:
        start, stop = (nbytes * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        if flags:
            os.ftruncate(file, nbytes)
        os.posix_fallocate(file, start, stop - start)  # on this rank's memory node; touching a page cannot fail later
        return mmap.mmap(file, nbytes), ""
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            return None, f"no shared memory can be made in {FOLDER}: {error.strerror}; {SWITCH}=0 does without"
        space = os.statvfs(FOLDER)
        return None, (
            f"{FOLDER} has no room for the {nbytes / 2**20:.1f} MiB that the {ranks.size} ranks of {ranks.name} share "
            f"(its size is {space.f_blocks * space.f_frsize / 2**20:.1f} MiB): give it more (mount -o remount,size=, "
            f"or docker run --shm-size), or set {SWITCH}=0 to do without, more slowly"
        )
    finally:
        os.close(file)
