"""Makes backward end with the mean of all ranks' gradients: the hooks on parameters and on autograd's engine.

A parameter's hook gives the gradient to the `Round` of this backward, and never blocks; the callback at the end of
backward completes the round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mpidl.collectives import Collectives
from mpidl.errors import ArgumentError, ClosedError, DtypeError
from mpidl.mpi import exit_protocol
from mpidl.optim.state import Named
from mpidl.synchronous.reduction.bucket import BucketMemory
from mpidl.synchronous.reduction.buckets import agree_on_arrival, make_buckets, with_homes
from mpidl.synchronous.reduction.header import FAILED, FINISHED, STEPPING, Header, StepCheck, StepHeader
from mpidl.synchronous.reduction.round import Round
from mpidl.synchronous.reduction.statistics import Statistics
from mpidl.synchronous.reduction.trailer import StepTrailer


class Reducer:
    """Makes `p.grad` the mean over all ranks at the end of each backward pass.

    Args:
        collectives: of a topology of the optimiser's own.
        named: parameters to reduce, with their names, in an order equal on all ranks.
        bucket_nbytes: largest size of a bucket in bytes.
        statistics: counts what rounds take.
        memories: of the buckets, if the weights are sharded; the buckets then stay as they are. Empty: made here.
        check: made by every rank before each step; None: no check.

    Attributes:
        arrival: the order of parameters in which buckets fill, once a backward has shown it. None before, and always
            None where buckets stay as they were cut.
        uneven: a rank whose parameters are the newest, once some rank has stepped without another; None before.
        synchronising: whether backward reduces gradients; False under `no_sync`.
        samples: weight of this rank's gradient; None: all ranks weigh alike.
        wish_to_stop: whether this rank wishes to stop.
        stopping: whether some rank wished to stop in a header that this rank has seen.
    """

    def __init__(
        self,
        collectives: Collectives,
        named: Named,
        bucket_nbytes: int,
        statistics: Statistics,
        *,
        memories: Sequence[BucketMemory] = (),
        check: StepCheck | None = None,
    ) -> None:
        self._collectives, self._ranks = collectives, collectives.topology
        self._named, self._bucket_nbytes, self._statistics = named, bucket_nbytes, statistics
        self._parameters = [parameter for _, parameter in named]
        self._buckets = with_homes(memories) if memories else make_buckets(collectives, named, bucket_nbytes)
        # Where the link was not measured, nothing may change on which the bits of a sum depend.
        self._fixed = bool(memories) or (self._ranks.link is not None and not self._ranks.link.measured)
        self._header = StepHeader(collectives, self._buckets.fingerprint, check)
        self._trailer = StepTrailer(collectives, len(named), len(self._buckets.memories))
        self._round: Round | None = None
        self._unsynced: set[int] = set()
        self._sequence = 0
        self._armed = False
        self._made: set[int] = set()  # parameters that had no gradient when backward began
        self.arrival: list[int] | None = None
        self.uneven: int | None = None
        self.synchronising = True
        self.samples: int | None = None
        self.wish_to_stop = self.stopping = False
        self._handles = [
            p.register_post_accumulate_grad_hook(partial(self._on_gradient, i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(self._parameters)
        ]

    # Hooks.

    def before_forward(self) -> None:
        """Forgets what an interrupted backward left behind; the next backward goes on with the same round."""
        if torch._C._current_graph_task_id() != -1:
            return  # recomputed inside a backward (checkpointing): nothing was interrupted
        for memory in self._buckets.memories:
            memory.replaced.clear()
        self._armed = False
        self._made.clear()
        if self._round is not None:
            self._round.restart()

    def before_backward(self) -> None:
        """Notes which gradients this backward will make; called when backward reaches an output of the model."""
        self._made.update([index for index, parameter in enumerate(self._parameters) if parameter.grad is None])
        self._arm()

    def _arm(self) -> None:
        """Makes the running backward call `_end_of_backward`; harmless when repeated.

        The first caller decides at the end of which backward that is. A hook on the model's output sees the outermost
        backward, a parameter inside a reentrant checkpoint only a nested one, so the output's hook should come first.
        """
        if not self._armed:
            self._armed = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_of_backward)

    def _on_gradient(self, index: int, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if gradient.layout is not torch.strided:
            raise DtypeError(f"parameter {self._named[index][0]} has a sparse gradient, which cannot be reduced")
        if not self.synchronising:
            self._unsynced.add(index)
            return
        started = time.perf_counter()
        if not self._armed:
            self._arm()
        now = self._round
        if now is None:
            now = self._round = self._begin(STEPPING)
        now.add(index, gradient)
        now.advance()
        self._statistics.seconds_communicating += time.perf_counter() - started

    def _end_of_backward(self) -> None:
        self._armed = False
        if self._round is not None:  # None: `no_sync`, or a backward that reached no parameter
            started = time.perf_counter()
            self._complete(self._round, self._round.arrived.keys() | self._accumulated())
            self._unsynced.clear()
            self._statistics.seconds_communicating += time.perf_counter() - started
        self._made.clear()

    # Rounds.

    def _start_header(self, state: int, error: int = 0) -> Callable[[bool], Header | None]:
        self._sequence += 1
        if exit_protocol.thread_failure() is not None:
            state = FAILED
        return self._header.start(state, self.samples, self._statistics.steps, self.wish_to_stop, error)

    def _begin(self, state: int) -> Round:
        get_header = self._start_header(state)
        weight = 0 if state == FINISHED else 1 if self.samples is None else self.samples
        return Round(
            self._sequence, weight, get_header, self._trailer, buckets=self._buckets, statistics=self._statistics
        )

    def _complete(self, now: Round, used: set[int]) -> Header:
        header = now.wait_for_header()
        self.stopping = self.stopping or header.stopping
        if not header.stepping:
            self._round = None
            return header
        now.complete(used, stepping=self._ranks.rank in header.stepping, made=self._made)
        if len(header.stepping) < self._ranks.size:
            self.uneven = header.stepping[0]
        self._round = None
        if self.arrival is None and not self._fixed:  # the first rank that stepped decides
            count = len(self._parameters)
            self.follow_arrival(agree_on_arrival(self._collectives, now.arrived, count, header.stepping[0]))
        return header

    def reduce(self) -> None:
        """Reduces the gradients that are there, outside a backward."""
        self._complete(self._begin(STEPPING), set(range(len(self._parameters))))

    def follow_arrival(self, order: list[int]) -> None:
        """Cuts buckets that fill in this order of parameters; between two rounds, alike on all ranks."""
        if self._fixed:
            return
        self.arrival = order
        self._buckets = make_buckets(self._collectives, self._named, self._bucket_nbytes, order)
        self._statistics.forget_buckets()
        self._header.fingerprint = self._buckets.fingerprint
        self._trailer = StepTrailer(self._collectives, len(self._named), len(self._buckets.memories))

    # For the optimiser above.

    def check_whole(self, what: str) -> None:
        """Refuses `what` after a backward that was interrupted half-way: other ranks still wait for the rest of it.

        Raises:
            ClosedError: the last backward was interrupted.
        """
        if self._round is not None:
            raise ClosedError(
                f"{what}: the last backward was interrupted during its reduction, for which the other ranks wait; "
                "repeat the forward and backward first, or let this rank end"
            )

    def check_steppable(self) -> None:
        """Refuses an optimiser step on gradients that were never reduced.

        Raises:
            ClosedError: the last backward was interrupted half-way.
            ArgumentError: gradients were accumulated under `no_sync` only.
        """
        self.check_whole("step")
        unsynced = self._accumulated()
        if unsynced:
            names = ", ".join(self._named[i][0] for i in sorted(unsynced)[:3])
            raise ArgumentError(
                f"step: {len(unsynced)} gradient(s) were accumulated under no_sync() and never reduced ({names}, "
                "...); run the last backward of a step outside no_sync()"
            )

    def _accumulated(self) -> set[int]:
        """Returns the parameters with a gradient from `no_sync`; `zero_grad` may have thrown some away since."""
        return {index for index in self._unsynced if self._parameters[index].grad is not None}

    def join(self, answer: Callable[[Header], None] | None = None) -> None:
        """Takes part in the other ranks' rounds without gradients until every rank has called `join`.

        Args:
            answer: takes part in what the other ranks do together outside backward.
        """
        while True:
            self.samples = None
            header = self._complete(self._begin(FINISHED), set())
            if header.doing == FINISHED:
                return
            if header.doing != STEPPING and answer is not None:
                answer(header)

    def announce(self, doing: int, error: int = 0) -> Header:
        """Waits until all ranks have come to do this, or are in `finish()`; a collective outside backward."""
        header = self._start_header(doing, error)(True)
        assert header is not None
        self.stopping = self.stopping or header.stopping
        return header

    def close(self) -> None:
        """Takes the hooks off the parameters; no reduction is under way any more."""
        for memory in self._buckets.memories:
            memory.replaced.clear()
        self._collectives.end_progress_thread()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
