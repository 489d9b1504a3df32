"""The exchanges between nodes, for 2 to 9 places in this process: messages pass through queues, in any order between
pairs. What real ranks do with them is in tests/mpi/test_lanes.py."""

from __future__ import annotations

import ctypes
import random
from collections import defaultdict, deque
from typing import Any

import numpy as np
import pytest

from mpidl.collectives import direct, halving_doubling
from mpidl.collectives.steps import Driven
from mpidl.collectives.wires import Scratch, Wire, cut

ALGORITHMS = {"direct": direct.allreduce, "halving_doubling": halving_doubling.allreduce}
COUNTS = (0, 1, 15, 16, 100, 1000)
OPS = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}


class Network:
    """The messages of all places: what was sent stays what it was, and is copied out when it is received."""

    def __init__(self, size: int) -> None:
        self.messages: defaultdict[tuple[int, int, int], deque[bytes]] = defaultdict(deque)
        self.ends = [End(self, place) for place in range(size)]
        self.nbytes = 0


class End:
    """What a wire needs of a topology."""

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
    size, dice = len(values), random.Random(len(values))
    network = Network(size)
    wires = [Wire(end, range(size), Scratch(), 1, wire_dtype) for end in network.ends]  # type: ignore[arg-type]
    runs = [Driven(ALGORITHMS[algorithm](wire, x, op, divisor)) for wire, x in zip(wires, values, strict=True)]
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


def test_blocks_cover_everything_once() -> None:
    for count in (0, 1, 15, 16, 17, 1000):
        for parts in range(1, 10):
            blocks = cut(np.arange(count), parts)
            assert len(blocks) == parts
            assert np.array_equal(np.concatenate(blocks), np.arange(count))
