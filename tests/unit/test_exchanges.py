"""The exchanges between nodes, for 2 to 9 places in this process: messages pass through queues, in any order between
pairs. What real ranks do with them is in tests/mpi/test_lanes.py."""

from __future__ import annotations

import ctypes
import random
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpidl.collectives.lanes import direct, halving_doubling, transport
from mpidl.collectives.lanes.transport import Exchange, Scratch, Transport, cut
from mpidl.collectives.tasks import RunningTask, Task

ALGORITHMS: dict[str, Exchange] = {"direct": direct, "halving_doubling": halving_doubling}
COUNTS = (0, 1, 15, 16, 100, 1000)
OPS = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}


class Network:
    """The messages of all places: what was sent stays what it was, and is copied out when it is received."""

    def __init__(self, size: int) -> None:
        self.messages: defaultdict[tuple[int, int, int], deque[bytes]] = defaultdict(deque)
        self.ends = [End(self, place) for place in range(size)]
        self.nbytes = 0


class End:
    """What a transport needs of a topology."""

    def __init__(self, network: Network, rank: int) -> None:
        self._network, self.rank = network, rank

    def start_send(self, address: int, nbytes: int, rank: int, tag: int) -> Any:
        self._network.nbytes += nbytes
        self._network.messages[self.rank, rank, tag].append(ctypes.string_at(address, nbytes))
        return Completed(lambda: True)

    def start_receive(self, address: int, nbytes: int, rank: int, tag: int) -> Any:
        queue = self._network.messages[rank, self.rank, tag]

        def arrived() -> bool:
            if not queue:
                return False
            message = queue.popleft()
            assert len(message) == nbytes
            ctypes.memmove(address, message, nbytes)
            return True

        return Completed(arrived)


class Completed:
    def __init__(self, attempt: Any) -> None:
        self._attempt, self._done = attempt, False

    def Test(self) -> bool:
        self._done = self._done or self._attempt()
        return self._done


def exchanged(
    algorithm: str, values: list[np.ndarray[Any, Any]], op: str, divisor: float = 1.0, wire_dtype: str = ""
) -> Network:
    return in_all_places(
        len(values),
        lambda transport: ALGORITHMS[algorithm].allreduce(transport, values[transport.place], op, divisor),
        wire_dtype,
    )


def scattered(
    algorithm: str, values: list[np.ndarray[Any, Any]], op: str, divisor: float = 1.0, wire_dtype: str = ""
) -> tuple[Network, list[np.ndarray[Any, Any]]]:
    """The network, and every place's block; the values are not touched."""
    copies = [x.copy() for x in values]
    out = [np.empty(x.size // len(values), x.dtype) for x in values]

    def run(transport: Transport) -> Task:
        return ALGORITHMS[algorithm].reduce_scatter(
            transport, copies[transport.place], out[transport.place], op, divisor
        )

    return in_all_places(len(values), run, wire_dtype), out


def in_all_places(size: int, run: Callable[[Transport], Task], wire_dtype: str = "") -> Network:
    dice, network = random.Random(size), Network(size)
    ends = [Transport(end, range(size), Scratch(), 1, wire_dtype) for end in network.ends]  # type: ignore[arg-type]
    runs = [RunningTask(run(transport)) for transport in ends]
    for _ in range(10_000):
        left = [run for run in runs if not run.Test()]
        if not left:
            break
        dice.shuffle(runs)
    assert not any(network.messages.values()), "a message was never received"
    assert not left
    return network


def whole_numbers(place: int, count: int, dtype: str) -> np.ndarray[Any, Any]:
    return ((np.arange(count) * 7 + place * 3) % 11 + 1).astype(dtype)


@pytest.mark.parametrize("size", range(2, 10))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_place_gets_the_reduction(algorithm: str, size: int) -> None:
    for dtype in ("float32", "float64", "int32", "int64"):
        for count in COUNTS:
            inputs = [whole_numbers(place, count, dtype) for place in range(size)]
            for op, function in OPS.items():
                expected = function.reduce(inputs)  # exact: 11^9 is below 2^32, and wraps around alike
                values = [x.copy() for x in inputs]
                exchanged(algorithm, values, op)
                for found in values:
                    if dtype == "float32":
                        assert np.allclose(found, expected, rtol=1e-6), (dtype, count, op)
                    else:
                        assert np.array_equal(found, expected), (dtype, count, op)


@pytest.mark.parametrize("size", range(2, 10))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bits_are_equal_everywhere(algorithm: str, size: int) -> None:
    for wire_dtype, tolerance in (("", 1e-6), ("bfloat16", 0.04)):
        rows = [np.random.default_rng(place).standard_normal(1003).astype(np.float32) for place in range(size)]
        exact = np.mean(np.array(rows, np.float64), axis=0)
        scale = np.mean(np.abs(np.array(rows, np.float64)), axis=0)
        exchanged(algorithm, rows, "sum", size, wire_dtype)
        assert all(np.array_equal(row, rows[0]) for row in rows[1:])
        assert (np.abs(rows[0] - exact) <= tolerance * scale).all()


@pytest.mark.parametrize("size", range(2, 10))
def test_the_mean_is_divided_once_and_direct_adds_in_the_order_of_places(size: int) -> None:
    rows = [np.random.default_rng(place).standard_normal(500).astype(np.float32) for place in range(size)]
    total = rows[0].copy()
    for row in rows[1:]:
        total += row
    exchanged("direct", rows, "sum", size)
    assert np.array_equal(rows[0], total / np.float32(size))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bytes_sent_are_the_least_and_half_in_bfloat16(algorithm: str) -> None:
    count = 1 << 14
    for size in (2, 4, 8):
        least = 2 * (size - 1) * count * 4  # of all places together
        for wire_dtype, expected in (("", least), ("bfloat16", least // 2)):
            rows = [whole_numbers(place, count, "float32") for place in range(size)]
            assert exchanged(algorithm, rows, "sum", 1.0, wire_dtype).nbytes == expected


@pytest.mark.parametrize("size", range(2, 10))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_reduce_scatter_has_the_bits_of_an_allreduce(algorithm: str, size: int) -> None:
    for share in (0, 1, 33):
        rows = [np.random.default_rng(place).standard_normal(size * share).astype(np.float32) for place in range(size)]
        for op in OPS:
            _, found = scattered(algorithm, rows, op, 3.0)
            whole = [row.copy() for row in rows]
            exchanged(algorithm, whole, op, 3.0)
            assert np.array_equal(np.concatenate(found), whole[0]), (share, op)


@pytest.mark.parametrize("size", range(2, 10))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_allgather_brings_every_block_everywhere(algorithm: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_MESSAGE", 64)  # a message of more bytes is several
    for share in (0, 1, 100):
        expected = np.concatenate([whole_numbers(place, share, "uint8") for place in range(size)])
        values = [np.zeros_like(expected) for _ in range(size)]
        for place, x in enumerate(values):
            x[place * share :][:share] = expected[place * share :][:share]
        network = in_all_places(
            size, lambda transport, x=values: ALGORITHMS[algorithm].allgather(transport, x[transport.place])
        )
        assert all(np.array_equal(x, expected) for x in values)
        if algorithm == "direct" or size in (2, 4, 8):
            assert network.nbytes == size * (size - 1) * share


@pytest.mark.parametrize("size", range(2, 10))
def test_a_broadcast_brings_roots_values_everywhere(size: int) -> None:
    for count in (0, 1, 17, 1000):
        for root in (0, size // 2, size - 1):
            values = [whole_numbers(place, count, "int32") for place in range(size)]
            expected = values[root].copy()
            in_all_places(
                size, lambda transport, x=values, root=root: direct.broadcast(transport, x[transport.place], root)
            )
            assert all(np.array_equal(x, expected) for x in values)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_blocks_of_a_reduce_scatter_travel_narrow_and_results_do_not(algorithm: str) -> None:
    for size in (2, 3, 4):
        # Exact in the 8 digits of bfloat16, and so are sums of two; sums of three are not.
        rows = [np.full(1600 * size, 255, np.float32) for _ in range(size)]
        network, found = scattered(algorithm, rows, "sum", 1.0, "bfloat16")
        assert (np.concatenate(found) == 255 * size).all()
        if size != 3:
            assert network.nbytes == size * (size - 1) * 1600 * 2


def test_blocks_cover_everything_once() -> None:
    for count in (0, 1, 15, 16, 17, 1000):
        for parts in range(1, 10):
            blocks = cut(np.arange(count), parts)
            assert len(blocks) == parts
            assert np.array_equal(np.concatenate(blocks), np.arange(count))
