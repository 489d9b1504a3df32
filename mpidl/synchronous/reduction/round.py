"""One backward pass of one rank, from the header that opens it to the gradients that are written back.

A round is a header, buckets 0, 1, 2, ... in that order on every rank, and a trailer that says which parameters were
used on some rank and which buckets must be reduced again. `Reducer` makes a round at the first gradient of a backward,
calls `arrive` and `advance` for each gradient, and `complete` at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

import torch

from mpidl.errors import ArgumentError
from mpidl.synchronous.reduction.bucket import BucketMemory
from mpidl.synchronous.reduction.buckets import GradientBuckets
from mpidl.synchronous.reduction.header import Header
from mpidl.synchronous.reduction.statistics import Statistics
from mpidl.synchronous.reduction.trailer import StepTrailer, Trailer


class Round:
    """The state of one backward pass: how far its buckets are, and what changed after their launch.

    Gradients are written back only by `complete`, so that `p.grad` holds this rank's own sum until then, and a bucket
    can be launched again if one of its gradients grew after the launch (reentrant checkpointing, a parameter that
    backward reaches twice).

    Args:
        sequence: number of the round, equal on all ranks.
        weight: how often this rank's gradients count: number of samples, or 1; 0 for a rank without samples.
        get_header: as `StepHeader.start` returned it.
        trailer: exchanged at the end.
        parameters: all, by index.
        buckets: of the optimiser; the round forgets what they held before.
        statistics: counts bytes, rounds and each bucket's seconds.

    Attributes:
        header: what all ranks said at the start; None while a rank's header is missing.
        launched: number of buckets whose reduction has been started.
        arrived: indices of parameters, in the order in which their gradients arrived.
        late: numbers of the buckets that changed after their launch.
    """

    def __init__(
        self,
        sequence: int,
        weight: int,
        get_header: Callable[[bool], Header | None],
        trailer: StepTrailer,
        *,
        parameters: Sequence[torch.Tensor],
        buckets: GradientBuckets,
        statistics: Statistics,
    ) -> None:
        self._sequence, self.weight, self._get_header = sequence, weight, get_header
        self._parameters, self._memories, self._homes = parameters, buckets.memories, buckets.homes
        self._trailer, self._statistics = trailer, statistics
        self._under_way: list[BucketMemory] = []
        self._dropped = 0  # the first so many buckets were launched with gradients that the user has thrown away
        self.header: Header | None = None
        self.launched = 0
        self.arrived: dict[int, None] = {}
        self.late: set[int] = set()
        self._newest: int | None = None  # the parameter that has arrived last, on whose gradient hooks may still run
        for memory in self._memories:
            memory.begin(weight)

    def arrive(self, index: int) -> None:
        """Notes that backward has accumulated one parameter's gradient, which stays where backward left it.

        Autograd calls a parameter's hooks one after the other, and the user's may come after the one that called this.
        The gradient is therefore taken when the next one arrives, or at the end: by then all hooks have run.
        """
        before, self._newest = self._newest, index
        if before is not None and before != index:
            self._take(before)

    def _take(self, index: int) -> None:
        gradient = self._parameters[index].grad
        if gradient is None:  # a hook of the user has taken it away
            return
        self.arrived[index] = None
        number = self._homes[index]
        if number < self.launched:
            self.late.add(number)
        else:
            self._memories[number].add(index, gradient)

    def take_newest(self) -> None:
        """Takes the gradient that has arrived last; at the end of backward."""
        newest, self._newest = self._newest, None
        if newest is not None:
            self._take(newest)

    def advance(self) -> None:
        """Moves reductions on and launches every full bucket whose turn it is; never blocks.

        No bucket is launched before the header is there, so that a rank in `finish()`, a failed thread, or ranks that
        have come apart are seen before any gradient is sent.
        """
        if self._under_way:
            self._under_way = [memory for memory in self._under_way if not memory.advance()]
        if self.header is None:
            self.header = self._get_header(False)
            if self.header is None:
                return
        memories, total = self._memories, self.header.total
        while self.launched < len(memories) and memories[self.launched].ready():
            memories[self.launched].launch((self._sequence, self.launched), total)
            self._under_way.append(memories[self.launched])
            self.launched += 1

    def restart(self) -> None:
        """Forgets this rank's gradients, which an interrupted backward made and the user has thrown away.

        The other ranks may wait for this round already, so the next backward goes on with it. The buckets that were
        launched with those gradients are late.
        """
        self.late.update(range(self.launched))
        self.arrived.clear()
        self._newest = None
        self._dropped = self.launched
        for memory in self._memories[self.launched :]:
            memory.begin(self.weight)

    def wait_for_header(self) -> Header:
        """Returns what all ranks said at the start of the round; a collective."""
        if self.header is None:
            self.header = self._get_header(True)
        assert self.header is not None
        return self.header

    def complete(self, used: Set[int], *, stepping: bool, made: Set[int], given: Set[int]) -> Trailer:
        """Reduces what is left, reduces late buckets again, and writes the means back; a collective.

        Args:
            used: indices of the parameters that this rank used.
            stepping: whether this rank brought gradients; a rank in `finish()` did not.
            made: indices of the parameters that had no gradient before this backward.
            given: indices of the parameters whose gradient the user has set.

        Returns:
            What the ranks said at the end; equal on all of them.

        Raises:
            ArgumentError: all ranks gave 0 samples.
            DtypeError: a gradient of this rank cannot be reduced.
            MismatchError: a gradient of another rank cannot be reduced.
        """
        if self.wait_for_header().total <= 0:
            raise ArgumentError("samples: all ranks gave 0 samples, so there is no mean to take")
        numbers = range(len(self._memories))
        if stepping:
            self._look_again()
        self._reduce(numbers[self.launched :], numbers)
        self.launched = len(numbers)
        trailer = self._agree(used if self.weight else set(), stepping)
        for memory in self._memories:
            memory.write_back(trailer, stepping=stepping, made=made, given=given)
            memory.forget()
        self._statistics.rounds += 1
        return trailer

    def _look_again(self) -> None:
        """Finds gradients that were written after they were taken, by hooks of modules, of tensors or of others.

        A bucket that was launched with them is late. In later rounds it waits for the end of backward.
        """
        for number, memory in enumerate(self._memories):
            if not memory.changed():
                continue
            if number < self.launched:
                self.late.add(number)
                memory.patient = True
            else:
                memory.forget()

    def _reduce(self, numbers: Iterable[int], awaited: Iterable[int], *, again: bool = False) -> None:
        """Fills and launches some buckets, and waits for the awaited ones; a missing gradient counts as zeros."""
        total = self.wait_for_header().total
        for number in numbers:
            self._memories[number].add_missing(again=again)
        for number in numbers:  # all are under way before this rank waits for the first
            self._memories[number].launch((self._sequence, number), total)
        for number in awaited:
            self._statistics.note_bucket(number, self._memories[number].wait())
            self._statistics.bytes += self._memories[number].nbytes

    def _agree(self, used: Set[int], stepping: bool) -> Trailer:
        """Exchanges the trailer and reduces late buckets again."""
        holding = self._memories if stepping else ()  # what the buckets of a rank in `finish()` hold is of a past step
        carried = [index for memory in holding for index in memory.carried()]
        finite = all(memory.finite() for memory in self._memories[self._dropped :])
        refused = next((memory.refused for memory in self._memories if memory.refused is not None), None)
        trailer = self._trailer.exchange(used, carried, self.late, nonfinite=not finite, refused=refused is not None)
        if trailer.refused:
            self._trailer.refuse(refused)
        self._reduce(trailer.late, trailer.late, again=True)
        self._statistics.nonfinite_rounds += trailer.nonfinite
        return trailer
