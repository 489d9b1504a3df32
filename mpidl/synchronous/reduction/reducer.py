"""Reduces gradients during backward: hooks, buckets, their launch order, and the end of backward.

One backward pass is one round: header, buckets 0, 1, 2, ... in that order on every rank, then a trailer that says which
parameters were used anywhere and which buckets must be done again. A parameter hook packs its gradient and moves on
whatever is ready, and never blocks; the callback at the end of backward waits. Gradients are written back only there,
so that until then `p.grad` holds this rank's own sum, and a bucket whose gradient grew after it was sent (reentrant
checkpointing, a parameter reached twice) can simply be sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from mpidl.collectives import Collectives
from mpidl.errors import ArgumentError, ClosedError, DtypeError
from mpidl.mpi import exit_protocol
from mpidl.optim.state import Named
from mpidl.synchronous.reduction.bucket import BucketMemory
from mpidl.synchronous.reduction.buckets import GradientBuckets
from mpidl.synchronous.reduction.header import FAILED, FINISHED, STEPPING, Header, StepHeader, Watcher
from mpidl.synchronous.reduction.round import Round
from mpidl.synchronous.reduction.statistics import Statistics
from mpidl.synchronous.reduction.trailer import StepTrailer, Trailer


class Reducer:
    """Makes `p.grad` the mean over all ranks at the end of each backward pass.

    Args:
        ranks: the collectives of a topology of the optimiser's own.
        named: parameters to reduce, with their names, in an order equal on all ranks.
        bucket_nbytes: size of a bucket in bytes.
        memories: of the buckets, and
        watcher: of each step, if the weights are shared.
    """

    def __init__(
        self,
        ranks: Collectives,
        named: Named,
        bucket_nbytes: int,
        statistics: Statistics,
        *,
        memories: Sequence[BucketMemory] = (),
        watcher: Watcher | None = None,
    ) -> None:
        self._collectives, self._ranks = ranks, ranks.topology
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._buckets = GradientBuckets(ranks, named, bucket_nbytes, statistics, memories)
        self._header = StepHeader(ranks, self._buckets.fingerprint, watcher)
        self._trailer = StepTrailer(ranks, len(named), len(self._buckets))
        self._statistics = statistics
        self._round: Round | None = None
        self._unsynced: set[int] = set()
        self._sequence = 0
        self.uneven: int | None = None  # a rank whose parameters are the newest, once some rank stepped alone
        self.synchronising = True
        self.samples: int | None = None
        self.wish_to_stop = self.stopping = False
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda _, i=i: self._on_gradient(i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(self._parameters)
        ]
        self._armed: int | None = None
        self._made: set[int] = set()  # parameters that had no gradient when backward began

    # Hooks.

    def before_forward(self) -> None:
        """Forgets what an interrupted backward left behind: the next one takes its place in the same round.

        The others may wait for that round already, so it is gone on with; but no gradient of the interrupted backward
        may count, since the user has thrown them away.
        """
        if torch._C._current_graph_task_id() != -1:
            return  # recomputed inside a backward (checkpointing): nothing was interrupted
        self._buckets.let_go()
        self._armed = None
        self._made.clear()
        if self._round is not None:
            self._round.restart()
            self._buckets.begin(self._round.launched)

    def before_backward(self) -> None:
        """Notes which gradients this backward will make; called when it reaches an output of the model."""
        self._made.update(index for index, parameter in enumerate(self._parameters) if parameter.grad is None)
        self.arm()

    def arm(self) -> None:
        """Makes the running backward call `_end_of_backward`; called from inside backward, harmless when repeated.

        The first caller decides at whose end that is. A hook on the model's output sees the outermost backward, a
        parameter inside a reentrant checkpoint only a nested one, so the output's hook should come first.
        """
        if self._armed is None:
            self._armed = torch._C._current_graph_task_id()
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_of_backward)

    def _on_gradient(self, index: int) -> None:
        gradient = self._parameters[index].grad
        if gradient is None:
            return
        if gradient.layout != torch.strided:
            raise DtypeError(f"parameter {self._names[index]} has a sparse gradient, which cannot be reduced")
        if not self.synchronising:
            self._unsynced.add(index)
            return
        started = time.perf_counter()
        self.arm()
        if self._round is None:
            self._round = self._begin(STEPPING)
        number = self._buckets.home(index)
        self._round.fired[index] = None
        if number < self._round.launched:
            self._round.late.add(number)
        else:
            self._buckets.pack(index, self._round.weight)
            self._advance(self._round)
        self._statistics.seconds_communicating += time.perf_counter() - started

    def reduce(self) -> None:
        """Reduces the gradients that are there, outside a backward."""
        now = self._begin(STEPPING)
        self._buckets.pack_rest(0, now.weight)
        self._advance(now)
        self._complete(now, set(range(len(self._parameters))))

    def _end_of_backward(self) -> None:
        self._armed = None
        if self._round is not None:  # None: `no_sync`, or a backward that reached no parameter
            self._end_round(self._round)
        self._made.clear()

    def _end_round(self, now: Round) -> None:
        started = time.perf_counter()
        self._complete(now, now.fired.keys() | self._accumulated())
        self._unsynced.clear()
        self._statistics.seconds_communicating += time.perf_counter() - started

    # A round.

    def _begin(self, state: int) -> Round:
        self._sequence += 1
        if exit_protocol.thread_failure() is not None:
            state = FAILED
        weight = 0 if state == FINISHED else 1 if self.samples is None else self.samples
        self._buckets.begin()
        steps = self._statistics.steps
        return Round(self._header.start(state, self.samples, steps, self.wish_to_stop), weight)

    def _advance(self, now: Round) -> None:
        """Launches every full bucket whose turn it is, once the header is there, and lets MPI move those under way."""
        if now.header is None:
            now.header = now.get_header(False)
            if now.header is None:
                return
        memories = self._buckets.memories
        while now.launched < len(memories) and memories[now.launched].ready():
            self._buckets.launch(now.launched, self._sequence, now.header.total)
            now.launched += 1
        for memory in memories[: now.launched]:
            memory.advance()

    def _complete(self, now: Round, used: set[int]) -> Header:
        """Ends a round: the rest is launched, waited for, done again where late, and written back."""
        header = now.header = now.header or now.get_header(True)
        assert header is not None
        self.stopping = self.stopping or header.stopping
        if not header.stepping:
            self._round = None
            return header
        if header.total <= 0:
            raise ArgumentError("samples: all ranks gave 0 samples, so there is no mean to take")
        self._buckets.pack_rest(now.launched, now.weight)
        self._reduce(range(now.launched, len(self._buckets)), header.total, range(len(self._buckets)))
        now.launched = len(self._buckets)
        trailer = self._agree(now, used if now.weight else set())
        stepping = self._ranks.rank in header.stepping
        for memory in self._buckets.memories:
            memory.write_back(trailer.used, trailer.carried, stepping=stepping, made=self._made)
        self._statistics.rounds += 1
        if len(header.stepping) < self._ranks.size:
            self.uneven = header.stepping[0]
        self._round = None
        if self.arrival is None and not self._buckets.stay:
            self._agree_on_arrival(now)
        return header

    def _reduce(self, numbers: Iterable[int], total: int, waiting: Iterable[int]) -> None:
        for number in numbers:  # all are on their way before the first is waited for
            self._buckets.launch(number, self._sequence, total)
        for number in waiting:
            self._buckets.wait(number)

    def _agree(self, now: Round, used: set[int]) -> Trailer:
        """Agrees on used and carried parameters, late buckets and non-finite gradients; does late buckets again."""
        assert now.header is not None
        memories = self._buckets.memories
        holding = memories if self._ranks.rank in now.header.stepping else ()  # what a rank in finish() holds is old
        carried = (index for memory in holding for index in memory.carried())
        finite = all(memory.finite for memory in memories[now.dropped :])
        trailer = self._trailer.exchange(used, carried, now.late, not finite)
        for index in (index for number in trailer.late for index in memories[number].bucket.members):
            self._buckets.pack(index, now.weight)
        self._reduce(trailer.late, now.header.total, trailer.late)
        self._statistics.nonfinite_rounds += int(trailer.nonfinite)
        return trailer

    def _agree_on_arrival(self, now: Round) -> None:
        """After the first backward: the order that the first rank which stepped has seen becomes everybody's."""
        assert now.header is not None
        rest = [index for index in reversed(range(len(self._parameters))) if index not in now.fired]
        mine = np.array([*now.fired, *rest], np.int64)
        everyone = np.empty((self._ranks.size, mine.size), np.int64)
        sequence = self._ranks.begin()
        request = self._collectives.start_words_gather(mine, everyone)
        self._ranks.wait(request, "the order of gradients", sequence)
        self.follow_arrival(everyone[now.header.stepping[0]].tolist())

    def follow_arrival(self, order: list[int]) -> None:
        """Lets buckets fill in this order of parameters from the next backward on; alike on all ranks."""
        if not self._buckets.stay:
            self._buckets.follow(order)
            self._header.layout = self._buckets.fingerprint
            self._trailer = StepTrailer(self._collectives, len(self._parameters), len(self._buckets))

    @property
    def arrival(self) -> list[int] | None:
        """The order of parameters in which buckets fill, once it was seen; None before, and if they stay as cut."""
        return self._buckets.arrival

    # For the optimiser above.

    def check_whole(self, what: str) -> None:
        """Refuses `what` after a backward that was interrupted half-way: the others still wait for the rest of it.

        Raises:
            ClosedError: it was.
        """
        if self._round is not None:
            raise ClosedError(
                f"{what}: the last backward was interrupted during its reduction, for which the other ranks wait; "
                "repeat the forward and backward first, or let this rank end"
            )

    def check_steppable(self) -> None:
        """Refuses an optimiser step on gradients that were never reduced.

        Raises:
            ClosedError: a backward was interrupted half-way.
            ArgumentError: gradients were accumulated under `no_sync` only.
        """
        self.check_whole("step")
        unsynced = self._accumulated()
        if unsynced:
            names = ", ".join(self._names[i] for i in sorted(unsynced)[:3])
            raise ArgumentError(
                f"step: {len(unsynced)} gradient(s) were accumulated under no_sync() and never reduced ({names}, "
                "...); run the last backward of a step outside no_sync()"
            )

    def _accumulated(self) -> set[int]:
        """Returns the parameters with a gradient from `no_sync`; `zero_grad` may have thrown some away since."""
        return {index for index in self._unsynced if self._parameters[index].grad is not None}

    def join(self, answer: Callable[[Header], None] | None = None) -> None:
        """Answers the others' rounds, and by `answer` what they do beside, until every rank has come here."""
        while True:
            self.samples = None
            header = self._complete(self._begin(FINISHED), set())
            if header.doing == FINISHED:
                return
            if header.doing != STEPPING and answer is not None:
                answer(header)

    def announce(self, doing: int, trouble: int = 0) -> Header:
        """Returns when all ranks have come to do this, or are in `finish()`; a collective outside backward."""
        self._sequence += 1
        state = FAILED if exit_protocol.thread_failure() is not None else doing
        header = self._header.start(state, self.samples, self._statistics.steps, self.wish_to_stop, trouble)(True)
        assert header is not None
        self.stopping = self.stopping or header.stopping
        return header

    def close(self) -> None:
        """Takes the hooks off the parameters; no reduction is under way any more."""
        self._buckets.let_go()
        self._collectives.end_progress_thread()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
