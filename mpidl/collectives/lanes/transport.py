"""What algorithms between nodes stand on: raw bytes to and from the ranks that lead the same slice on other nodes.

Values may travel in bfloat16 and are float32 again where they arrive; sums are never taken in it. Which blocks go
where, and in which order, is the algorithms' affair (`direct`, `halving_doubling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mpidl.collectives.tasks import Task, Together
from mpidl.mpi.topology import Topology
from mpidl.native import library, node

Values = np.ndarray[Any, Any]
_MESSAGE = 1 << 30  # bytes at most: counts of MPI-3 bindings end at 2^31 - 1


class Scratch:
    """Memory that is used again and again, since fresh pages cost as much as a copy into them."""

    def __init__(self) -> None:
        self._free: dict[int, list[Values]] = {}

    def take(self, nbytes: int) -> Values:
        """Returns at least so many bytes, of any content."""
        size = 1 << max(12, (nbytes - 1).bit_length())
        kept = self._free.get(size)
        return kept.pop() if kept else np.empty(size, np.uint8)

    def give_back(self, memory: Values) -> None:
        self._free.setdefault(memory.size, []).append(memory)


class Exchange(Protocol):
    """What an algorithm between nodes is; the modules `direct` and `halving_doubling` are. They say what each does."""

    def allreduce(self, transport: Transport, values: Values, op: str, divisor: float) -> Task: ...

    def reduce_scatter(self, transport: Transport, values: Values, out: Values, op: str, divisor: float) -> Task: ...

    def allgather(self, transport: Transport, values: Values) -> Task: ...


class Transport:
    """One exchange between the leaders of one slice.

    Args:
        topology: of all ranks.
        ranks: the leaders, one of each node.
        scratch: where temporary memory comes from.
        tag: tells this exchange from others under way between the same ranks.
        wire_dtype: in which float32 values travel; "" for as they are.

    Attributes:
        size: number of leaders.
        place: of this rank among them.
    """

    def __init__(self, topology: Topology, ranks: Sequence[int], scratch: Scratch, tag: int, wire_dtype: str) -> None:
        self._topology, self._ranks, self._scratch, self._tag = topology, ranks, scratch, tag
        self._wire_dtype = wire_dtype
        self._taken: list[Values] = []
        self.size, self.place = len(ranks), ranks.index(topology.rank)

    @property
    def others(self) -> list[int]:
        """The other places, beginning behind this one, so that not all send to one at a time."""
        return [(self.place + step) % self.size for step in range(1, self.size)]

    def send(self, place: int, values: Values) -> Any:
        """Starts sending; `values` must not change before the request has completed."""
        return self._started(self._topology.start_send, self._encoded(values), place)

    def receive(self, place: int, out: Values) -> Any:
        """Starts receiving into `out`."""
        if not self._narrows(out):
            return self._started(self._topology.start_receive, out, place)
        raw = self.temporary(out.size, np.dtype(np.uint16))
        return _Decoded(self._started(self._topology.start_receive, raw, place), raw, out, self._wire_dtype)

    def _started(self, start: Any, values: Values, place: int) -> Any:
        address, nbytes, peer = values.ctypes.data, values.nbytes, self._ranks[place]
        if nbytes <= _MESSAGE:
            return start(address, nbytes, peer, self._tag)
        pieces = [(address + at, min(_MESSAGE, nbytes - at)) for at in range(0, nbytes, _MESSAGE)]
        return Together([start(*piece, peer, self._tag) for piece in pieces])

    def as_received(self, values: Values) -> None:
        """Rounds values in place to what others get of them."""
        if self._narrows(values):
            _decode(self._encoded(values), values, self._wire_dtype)

    def temporary(self, count: int, dtype: Any) -> Values:
        """Returns memory that lives as long as this exchange."""
        memory = self._scratch.take(count * dtype.itemsize)
        self._taken.append(memory)
        return memory[: count * dtype.itemsize].view(dtype)

    def reduce(self, sources: Sequence[Values], out: Values, op: str, divisor: float = 1.0) -> None:
        """Writes op(first, second, ...) / divisor to `out`, which is one of the sources or lies apart."""
        addresses = [source.ctypes.data for source in sources]
        node.reduce(addresses, out.ctypes.data, out.size, dtype=out.dtype.name, op=op, divisor=divisor)

    def end(self) -> None:
        """Gives temporary memory back, when all requests have completed."""
        for memory in self._taken:
            self._scratch.give_back(memory)
        self._taken.clear()

    def _narrows(self, values: Values) -> bool:
        return bool(self._wire_dtype) and values.dtype == np.float32

    def _encoded(self, values: Values) -> Values:
        if not self._narrows(values):
            return values
        out = self.temporary(values.size, np.dtype(np.uint16))
        table = library.segments([values.size], [0])
        library.gather(table, [values.ctypes.data], "float32", out.ctypes.data, self._wire_dtype, scale=1.0)
        return out


class _Decoded:
    """A request for narrow values that writes them out once they are there."""

    def __init__(self, request: Any, raw: Values, out: Values, dtype: str) -> None:
        self._request, self._raw, self._out, self._dtype = request, raw, out, dtype
        self._done = False

    def Test(self) -> bool:  # noqa: N802  # as MPI names it
        if not self._done and self._request.Test():
            _decode(self._raw, self._out, self._dtype)
            self._done = True
        return self._done


def _decode(raw: Values, out: Values, dtype: str) -> None:
    table = library.segments([out.size], [0])
    library.scatter(table, [out.ctypes.data], "float32", raw.ctypes.data, dtype, scale=1.0)


def cut(values: Values, parts: int) -> list[Values]:
    """Returns as many views of about equal length, whole cache lines each, the last ones shorter or empty."""
    share = (values.size + parts - 1) // parts
    share = (share + 15) // 16 * 16
    return [values[part * share : (part + 1) * share] for part in range(parts)]
