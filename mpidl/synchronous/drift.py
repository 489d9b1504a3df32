"""Whether the replicas of synchronous training stay equal: three words in the header of every step.

One word is a hash of the numbers in `param_groups`. One is a checksum of a sample of the weights, taken at the end of
every so many steps. One, in the second round only, is a checksum of this rank's own gradients of the first round. Where
the words of the ranks differ, or those of the gradients do not, all ranks compare further, together.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mpidl.arrays import view as arrays
from mpidl.errors import MismatchError
from mpidl.mpi import exit_protocol
from mpidl.mpi.topology import Topology
from mpidl.optim import transport, verify
from mpidl.optim.buffers import describe_difference
from mpidl.optim.state import Named, memory_order

WORDS = 3  # groups, weights, gradients
NOTHING = (0, 0, 0)
_SAMPLES = 16  # elements of a parameter in one checksum; the next checksum takes their neighbours
_EVERY, _EVERY_ON_DEVICE = 16, 256  # steps between two checksums; on a device each waits for the device's stream
_ITEM = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
_GRADIENT_SAMPLES = 4096


class Drift:
    """Finds replicas that have come apart.

    Args:
        ranks: of the optimiser.
        named: the trained parameters, with their names.
        groups: returns the optimiser's `param_groups`.
    """

    def __init__(self, ranks: Topology, named: Named, groups: Callable[[], list[dict[str, Any]]]) -> None:
        self._ranks, self._named, self._groups = ranks, named, groups
        self._every = _EVERY if arrays.view(named[0][1]).device == "cpu" else _EVERY_ON_DEVICE
        self._seen: list[dict[str, Any]] = []  # the groups when their word was computed
        self._live = True  # some value can change without being replaced, so that every step computes the word
        self._groups_word = self._weights_word = self._gradients_word = 0
        self._first_round = ranks.size > 1
        self._memory: list[tuple[int, np.ndarray[Any, Any], int]] = []  # of each parameter: address, elements, stride
        self._turn = 0

    # Words of this rank.

    def words(self, *, finishing: bool) -> tuple[int, int, int]:
        """Returns the words for the next header."""
        weights, self._weights_word = self._weights_word, 0
        gradients, self._gradients_word = self._gradients_word, 0
        return (0, 0, gradients) if finishing else (self._word_of_groups(), weights, gradients)

    def close(self) -> None:
        """Lets go of the weights' memory."""
        self._memory.clear()

    def after_step(self, steps: int) -> None:
        """Takes a sample of the weights, if it is time to; called with the number of steps taken.

        Between steps a program may change weights on each rank as it likes, and put them back (SAM, evaluation with
        averaged weights): here, at the end of a step, they must be equal.
        """
        if (steps == 1 or steps % self._every == 0) and self._ranks.size > 1:
            self._weights_word = self._checksum()

    def note_gradients(self) -> None:
        """Takes the checksum of this rank's own gradients, before they are reduced, in the first round only."""
        if not self._first_round:
            return
        self._first_round = False
        found, some = 0, False
        for _, p in self._named:
            if p.grad is not None and p.grad.layout is torch.strided and p.grad.numel():
                flat = p.grad.detach().reshape(-1)
                flat = flat[:: 1 + flat.numel() // _GRADIENT_SAMPLES].contiguous()
                values = np.asarray(transport.on_host(flat.view(torch.uint8)).owner)
                some = some or bool(values.any())
                found = zlib.crc32(values.data, found)
        self._gradients_word = 1 + found if some else 0

    def _word_of_groups(self) -> int:
        groups = self._groups()
        if not self._live:
            try:
                if groups == self._seen:
                    return self._groups_word
            except (RuntimeError, ValueError, TypeError):  # an array was replaced by another one
                pass
        self._seen = [dict(group) for group in groups]
        self._live = any(
            isinstance(value, torch.Tensor | np.ndarray | list | dict)
            for group in groups
            for key, value in group.items()
            if key != "params"
        )
        self._groups_word = hash(tuple(_number(v) for g in groups for k, v in g.items() if k != "params"))
        return self._groups_word

    def _checksum(self) -> int:
        if self._every != _EVERY:
            return self._checksum_on_device()
        self._turn += 1
        if len(self._memory) != len(self._named) or any(
            address != p.data_ptr() or array.dtype.itemsize != p.element_size() or array.size != p.numel()
            for (address, array, _), (_, p) in zip(self._memory, self._named, strict=True)
        ):
            self._memory = [_elements(p) for _, p in self._named]
        turn = self._turn
        return 1 + zlib.crc32(b"".join([array[turn % step :: step].tobytes() for _, array, step in self._memory]))

    def _checksum_on_device(self) -> int:
        self._turn += 1
        samples = []
        for _, p in self._named:
            flat = p.detach().reshape(-1)
            step = 1 + flat.numel() // _SAMPLES
            samples.append(flat[self._turn % step :: step].double())
        together = torch.cat(samples).contiguous()
        found = zlib.crc32(np.asarray(transport.on_host(together.view(torch.uint8)).owner).data)
        return 1 + found

    # What all ranks do together, in the header.

    def compare(self, words: Sequence[Sequence[int]], among: Sequence[int]) -> None:
        """Compares what the ranks said; where words differ, a collective of all ranks.

        Args:
            words: of each rank.
            among: the ranks that are not in `finish()`; only these are compared.

        Raises:
            MismatchError: numbers in `param_groups`, or weights, differ between ranks; alike on all ranks.
        """
        if len({words[rank][0] for rank in among}) > 1:
            self._compare_groups(among)
        if len({words[rank][1] for rank in among}) > 1:
            error = self.find_difference("the replicas have drifted apart", among)
            if error is not None:
                raise error
        first = words[0][2]
        if first and all(gradients == first for _, _, gradients in words):
            self._warn_of_equal_data()

    def find_difference(self, what: str, among: Sequence[int] | None = None) -> MismatchError | None:
        """Returns an error about the first trained parameter that differs between ranks; a collective."""
        tensors: dict[str, torch.Tensor] = {f"parameter {name}": p for name, p in self._named}
        error = describe_difference(self._ranks, tensors, what)
        return error or verify.find_difference(self._ranks, tensors, what, among)

    def _warn_of_equal_data(self) -> None:
        """Says once, on rank 0, that the ranks seem to train on the same data."""
        if self._ranks.rank == 0:
            exit_protocol.say(
                "Synchronous: the gradients of the first batch are bit-equal on all ranks: do all ranks read the same "
                "data? Give each rank its own part, with torch.utils.data.DistributedSampler for example"
            )

    def _compare_groups(self, among: Sequence[int]) -> None:
        mine = [{k: _shown(v) for k, v in group.items() if k != "params"} for group in self._groups()]
        texts = self._ranks.gather_bytes(json.dumps(mine).encode(), "comparing param_groups")
        everyone = {rank: json.loads(texts[rank]) for rank in among}
        for place in range(max(len(groups) for groups in everyone.values())):
            at = {rank: groups[place] if place < len(groups) else {} for rank, groups in everyone.items()}
            for key in dict.fromkeys(key for group in at.values() for key in group):
                values = {rank: group.get(key) for rank, group in at.items()}
                if len({json.dumps(value) for value in values.values()}) > 1:
                    raise MismatchError(_describe(key, place, values))


def _describe(key: str, place: int, values: Mapping[int, Any]) -> str:
    by_value: dict[str, list[int]] = {}
    for rank, value in values.items():
        by_value.setdefault("not set" if value is None else str(value), []).append(rank)
    found = " and ".join(
        f"{text} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        for text, ranks in by_value.items()
    )
    advice = "every rank must set the same value"
    if key == "lr":
        advice = "was ReduceLROnPlateau given the local loss? average it over the ranks first"
    return f"{key} of parameter group {place} is {found}: {advice}"


def _number(value: Any) -> Any:
    """Returns what is compared of a group's value: a number, or a tuple of such; 0 for anything else."""
    if isinstance(value, bool | int | float):
        return (
            0 if isinstance(value, float) and math.isnan(value) else value
        )  # the hash of a NaN differs from that of another NaN
    if isinstance(value, tuple | list):
        return tuple(_number(one) for one in value)
    if isinstance(value, torch.Tensor) and not value.is_cpu:
        return 0  # reading it would wait for the device
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        whole = value.numel() if isinstance(value, torch.Tensor) else value.size
        item = value.item() if whole == 1 else 0
        return _number(item) if isinstance(item, bool | int | float) else 0
    return 0


def _shown(value: Any) -> Any:
    """Returns a compared value as a text; None for one that is not compared."""
    if isinstance(value, tuple | list):
        return str([_shown(one) for one in value])
    if isinstance(value, bool | int | float | np.generic | np.ndarray | torch.Tensor):
        return repr(_number(value))
    return None


def _elements(parameter: torch.Tensor) -> tuple[int, np.ndarray[Any, Any], int]:
    """Returns a parameter's address, its elements in memory, and the stride of a sample; address 0: of a copy."""
    flat, address = parameter.detach().permute(memory_order(parameter)), parameter.data_ptr()
    if not flat.is_contiguous():
        flat, address = flat.contiguous(), 0
    array: np.ndarray[Any, Any] = transport.as_bytes(flat).numpy().view(_ITEM[parameter.element_size()])
    return address, array, 1 + array.size // _SAMPLES
