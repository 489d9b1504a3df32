"""Reduces gradients during backward: hooks, buckets, their launch order, and the end of backward.

One backward pass is one round: header, buckets 0, 1, 2, ... in that order on every rank, then a trailer that says which
parameters were used anywhere and which buckets must be done again. A parameter hook packs its gradient and moves on
whatever is ready, and never blocks; the callback at the end of backward waits. Gradients are written back only there,
so that until then `p.grad` holds this rank's own sum, and a bucket whose gradient grew after it was sent (reentrant
checkpointing, a parameter reached twice) can simply be sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mpidl import leaving
from mpidl.bucket_memory import BucketMemory, cut_into_buckets
from mpidl.collectives import Collectives
from mpidl.device_bucket_memory import bucket_memory
from mpidl.errors import ArgumentError, ClosedError, DtypeError
from mpidl.layout import fingerprint
from mpidl.reduction_round import Round
from mpidl.state import Named
from mpidl.statistics import Statistics
from mpidl.step_header import FAILED, FINISHED, STEPPING, Header, StepHeader, Watcher


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
        cut = cut_into_buckets(named, bucket_nbytes)
        self._memories = list(memories) or [bucket_memory(bucket, self._parameters) for bucket in cut]
        self._home = {index: number for number, bucket in enumerate(cut) for index in bucket.members}
        self._header = StepHeader(ranks, fingerprint(cut), watcher)
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
        self._armed = None
        self._made.clear()
        if self._round is not None:
            self._round.restart()
            for memory in self._memories[self._round.launched :]:
                memory.begin()

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
        number = self._home[index]
        self._round.fired.add(index)
        if number < self._round.launched:
            self._round.late.add(number)
        else:
            self._pack(self._round, index)
            self._advance(self._round)
        self._statistics.seconds_communicating += time.perf_counter() - started

    def reduce(self) -> None:
        """Reduces the gradients that are there, outside a backward."""
        now = self._begin(STEPPING)
        for index in range(len(self._parameters)):
            self._pack(now, index)
        self._advance(now)
        self._complete(now, set(range(len(self._parameters))))

    def _end_of_backward(self) -> None:
        self._armed = None
        if self._round is not None:  # None: `no_sync`, or a backward that reached no parameter
            self._end_round(self._round)
        self._made.clear()

    def _end_round(self, now: Round) -> None:
        started = time.perf_counter()
        self._complete(now, now.fired | self._accumulated())
        self._unsynced.clear()
        self._statistics.seconds_communicating += time.perf_counter() - started

    # A round.

    def _begin(self, state: int) -> Round:
        self._sequence += 1
        if leaving.thread_failure() is not None:
            state = FAILED
        weight = 0 if state == FINISHED else 1 if self.samples is None else self.samples
        for memory in self._memories:
            memory.begin()
        steps = self._statistics.steps
        return Round(self._header.start(state, self.samples, steps, self.wish_to_stop), weight)

    def _pack(self, now: Round, index: int) -> None:
        gradient = self._parameters[index].grad
        self._memories[self._home[index]].pack(index, gradient, now.weight)

    def _advance(self, now: Round) -> None:
        """Launches every full bucket whose turn it is, once the header is there, and lets MPI move those under way."""
        if now.header is None:
            now.header = now.get_header(False)
            if now.header is None:
                return
        while now.launched < len(self._memories):
            memory = self._memories[now.launched]
            if not memory.ready():
                break
            self._launch(now, now.launched)
            now.launched += 1
        for memory in self._memories[: now.launched]:
            memory.advance()

    def _launch(self, now: Round, number: int) -> None:
        assert now.header is not None
        memory = self._memories[number]
        memory.launch(self._collectives, (self._sequence, number), now.header.total)
        self._statistics.bytes += memory.nbytes

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
        for memory in self._memories[now.launched :]:
            for index in memory.bucket.members:
                if index not in memory.packed:
                    self._pack(now, index)
        for number in range(now.launched, len(self._memories)):  # all are on their way before the first is waited for
            self._memories[number].ready(wait=True)
            self._launch(now, number)
        now.launched = len(self._memories)
        for number in range(len(self._memories)):
            self._wait(number)
        used_anywhere, carried = self._trailer(now, used if now.weight else set())
        stepping = self._ranks.rank in header.stepping
        for memory in self._memories:
            memory.write_back(used_anywhere, carried, stepping=stepping, made=self._made)
        self._statistics.rounds += 1
        if len(header.stepping) < self._ranks.size:
            self.uneven = header.stepping[0]
        self._round = None
        return header

    def _wait(self, number: int) -> None:
        self._memories[number].wait(self._collectives)
        self._statistics.note_bucket(number, self._memories[number].seconds())

    def _trailer(self, now: Round, used: set[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Agrees on used and carried parameters, late buckets and non-finite gradients; does late buckets again."""
        count, late_from = len(self._parameters), 2 * len(self._parameters)
        flags = np.zeros(late_from + len(self._memories) + 1, np.uint8)
        flags[list(used)] = 1
        if now.header is not None and self._ranks.rank in now.header.stepping:  # what a rank in finish() holds is old
            for memory in self._memories:
                flags[[count + index for index in memory.carried()]] = 1
        flags[[late_from + number for number in now.late]] = 1
        flags[-1] = not all(memory.finite for memory in self._memories[now.dropped :])
        agreed = np.empty_like(np.packbits(flags))
        sequence = self._ranks.begin()
        mine = np.packbits(flags)
        self._ranks.wait(self._collectives.start_words_or(mine, agreed), "the end of a synchronised step", sequence)
        flags = np.unpackbits(agreed, count=flags.size)
        again = [number for number in range(len(self._memories)) if flags[late_from + number]]
        for number in again:
            for index in self._memories[number].bucket.members:
                self._pack(now, index)
            self._memories[number].ready(wait=True)
            self._launch(now, number)
        for number in again:
            self._wait(number)
        self._statistics.nonfinite_rounds += int(flags[-1])
        return flags[:count], flags[count:late_from]

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
        state = FAILED if leaving.thread_failure() is not None else doing
        header = self._header.start(state, self.samples, self._statistics.steps, self.wish_to_stop, trouble)(True)
        assert header is not None
        self.stopping = self.stopping or header.stopping
        return header

    def close(self) -> None:
        """Takes the hooks off the parameters; no reduction is under way any more."""
        self._collectives.end_helper()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
