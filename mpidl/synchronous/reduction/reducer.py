"""Makes backward end with the mean of all ranks' gradients: the hooks on parameters and on autograd's engine.

A parameter's hook gives the gradient to the `Round` of this backward, and never blocks; the callback at the end of
backward completes the round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from mpidl.collectives import Collectives
from mpidl.errors import ArgumentError, ClosedError, DtypeError, MismatchError
from mpidl.mpi import exit_protocol
from mpidl.mpi.agreement import fingerprint
from mpidl.optim.signature import Signature
from mpidl.optim.state import Named
from mpidl.synchronous.drift import Drift
from mpidl.synchronous.reduction import autograd
from mpidl.synchronous.reduction.bucket import BucketMemory
from mpidl.synchronous.reduction.buckets import agree_on_arrival, make_buckets, with_homes
from mpidl.synchronous.reduction.checks import BothChecks
from mpidl.synchronous.reduction.header import FAILED, FINISHED, REDUCING, STEPPING, Header, StepCheck, StepHeader
from mpidl.synchronous.reduction.record import ReductionRecord
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
        signature: of the same parameters.
        modules: of the model.
        memories: of the buckets, if the weights are sharded; the buckets then stay as they are. Empty: made here.
        check: made by every rank before each step, beside that of the signature; None: no other check.

    Attributes:
        arrival: the order of parameters in which buckets fill, once a backward has shown it. None before, and always
            None where buckets stay as they were cut.
        uneven: a rank whose parameters are the newest, once some rank has stepped without another; None before.
        synchronising: whether backward reduces gradients; False under `no_sync`.
        samples: weight of this rank's gradient; None: all ranks weigh alike.
        unspent: a weight that was given since the last step, and with which no backward has reduced; None: none.
        weights: those of this rank in rounds with gradients, since the last `clear()`.
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
        signature: Signature,
        modules: Sequence[torch.nn.Module],
        memories: Sequence[BucketMemory] = (),
        check: StepCheck | None = None,
    ) -> None:
        self._collectives, self._ranks = collectives, collectives.topology
        self._named, self._bucket_nbytes, self._statistics = named, bucket_nbytes, statistics
        self._parameters = [parameter for _, parameter in named]
        self._buckets = with_homes(memories) if memories else make_buckets(collectives, named, bucket_nbytes)
        # Where the link was not measured, nothing may change on which the bits of a sum depend.
        self._sharded = bool(memories)
        self._fixed = self._sharded or (self._ranks.link is not None and not self._ranks.link.measured)
        self._signature, self._modules, self._check = signature, modules, BothChecks(signature, check)
        names = [name for name, _ in named]
        self._header = StepHeader(collectives, self._buckets.fingerprint, names, self._check)
        self._record = ReductionRecord(self._parameters)
        self._trailer = StepTrailer(collectives, len(named), len(self._buckets.memories))
        self._round: Round | None = None
        self._unsynced: set[int] = set()
        self._sequence = 0
        self._refused = False  # whether the last backward ended with an error that all ranks know
        self._followed = 0  # the fingerprint of a model that has changed since
        self._armed = False
        self._made: set[int] = set()  # parameters that had no gradient when backward began
        self.arrival: list[int] | None = None
        self.uneven: int | None = None
        self.synchronising = True
        self.samples: int | None = None
        self.unspent: int | None = None
        self.weights: set[int] = set()
        self.wish_to_stop = self.stopping = False
        self._swaps = autograd.Swaps(self._parameters[0])
        self._handles: list[Any] = []
        self._register_hooks()

    def _register_hooks(self) -> None:
        autograd.install_hooks(self._parameters)
        for handle in self._handles:
            handle.remove()
        self._handles = [
            p.register_post_accumulate_grad_hook(partial(self._on_gradient, i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(self._parameters)
        ]

    # Hooks.

    def before_forward(self) -> None:
        """Forgets what an interrupted backward left behind; the next backward goes on with the same round."""
        if (self._armed or self._round is not None) and autograd.in_backward():
            return  # recomputed in this backward (checkpointing), or run by a second thread: nothing was interrupted
        if self._swaps.seen():
            autograd.install_hooks(self._parameters)
        for memory in self._buckets.memories:
            memory.replaced.clear()
        self._record.release()
        self._armed = self._refused = False
        self._made.clear()
        if self._round is not None:
            self._round.restart()

    def before_backward(self) -> None:
        """Notes which gradients this backward will make; called when backward reaches an output of the model."""
        for memory in self._buckets.memories if autograd.has_backward_hooks(self._modules) else ():
            memory.patient = True
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
        if parameter.grad is None:
            return
        if not self.synchronising:
            self._unsynced.add(index)
            return
        started = time.perf_counter()
        if not self._armed:  # no hook on the output has told of this backward
            self.before_backward()
        now = self._round
        if now is None:
            now = self._round = self._begin(STEPPING, self.samples)
            self.unspent = None
        with self._ending():
            now.arrive(index)
            now.advance()
        self._statistics.seconds_communicating += time.perf_counter() - started

    def _end_of_backward(self) -> None:
        self._armed = False
        if self._round is not None:  # None: `no_sync`, or a backward that reached no parameter
            started = time.perf_counter()
            self._round.take_newest()
            with self._ending():
                self._complete(self._round, self._round.arrived.keys() | self._accumulated())
            self._unsynced.clear()
            self._statistics.seconds_communicating += time.perf_counter() - started
        self._made.clear()

    @property
    def weight(self) -> int:
        """How often a gradient of this rank counts: its number of samples, or 1."""
        return 1 if self.samples is None else self.samples

    # Rounds.

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Ends the round of this backward with an error that all ranks have found in what they said to each other."""
        try:
            yield
        except (ArgumentError, DtypeError, MismatchError):
            self._round, self._refused = None, True
            raise

    def _start_header(
        self, state: int, samples: int | None, *, error: int = 0, new: int | None = None
    ) -> Callable[[bool], Header | None]:
        self._sequence += 1
        error = error or self._check.check(finishing=state == FINISHED)
        if self._signature.changed and not error:
            self._follow_model()
        if exit_protocol.thread_failure() is not None:
            state = FAILED
        steps, stopping = self._statistics.steps, self.wish_to_stop
        return self._header.start(state, samples, steps, stopping, error=error, new=new)

    def _begin(self, state: int, samples: int | None, *, error: int = 0, new: int | None = None) -> Round:
        get_header = self._start_header(state, samples, error=error, new=new)
        self._record.release()
        weight = 0 if state == FINISHED else 1 if samples is None else samples
        self.weights.add(weight)
        return Round(
            self._sequence,
            weight,
            get_header,
            self._trailer,
            parameters=self._parameters,
            buckets=self._buckets,
            statistics=self._statistics,
        )

    def _follow_model(self) -> None:
        """Cuts buckets anew for parameters that were cast or have got other shapes; the header says if ranks differ."""
        self._signature.settle()
        if not self._sharded:
            self._buckets = make_buckets(self._collectives, self._named, self._bucket_nbytes, self.arrival)
            self._renewed()
            self._register_hooks()
        self._followed = fingerprint(json.dumps(self._signature.describe()))
        self._header.fingerprint = self._buckets.fingerprint ^ self._followed

    def _complete(self, now: Round, used: set[int], given: Set[int] = frozenset()) -> Header:
        header = now.wait_for_header()
        self.stopping = self.stopping or header.stopping
        if not header.stepping:
            self._round = None
            return header
        stepping = self._ranks.rank in header.stepping
        if self._header.drift is not None and stepping and now.weight != 0:
            self._header.drift.note_gradients()
        trailer = now.complete(used, stepping=stepping, made=self._made, given=given)
        self._record.note_round(trailer.used)
        if len(header.stepping) < self._ranks.size:
            self.uneven = header.stepping[0]
        self._round = None
        if self.arrival is None and not self._fixed and header.in_backward:  # the first rank of these decides
            count = len(self._parameters)
            self.follow_arrival(agree_on_arrival(self._collectives, now.arrived, count, header.in_backward[0]))
        return header

    # Gradients that no backward has reduced.

    def reduce(self) -> None:
        """Reduces the gradients that are there and that no round has reduced yet; a collective outside backward."""
        self._reduce(self._unreduced("reduce"))

    def reduce_missing(self, what: str) -> None:
        """Reduces gradients that no round has reduced yet; a collective if there are any, or if no round has been.

        A rank whose gradients have all been reduced goes on at once. Another rank then begins a round which this rank
        meets in its next header, and the header names the two.

        Args:
            what: the call in which this happens, for messages.

        Raises:
            ClosedError: the last backward was interrupted half-way.
        """
        unreduced = self._unreduced(what)
        if unreduced or not self._record.rounds:
            self._reduce(unreduced)

    def _unreduced(self, what: str) -> set[int]:
        self.check_whole(what)
        if self._refused:
            raise ClosedError(
                f"{what}: the last backward ended with an error, on all ranks, and its gradients were not reduced: "
                "remove the cause, call zero_grad(), and repeat the forward and backward first"
            )
        return self._record.unreduced() | self._accumulated()

    def _reduce(self, unreduced: set[int]) -> None:
        started = time.perf_counter()
        given = unreduced - self._unsynced
        misfit = next((i for i in sorted(given) if not self._fits(i)), None)
        autograd.install_hooks([self._parameters[i] for i in given])
        samples = self.unspent if self.samples is None else self.samples
        error = 0 if misfit is None else self._check.gradient_error(misfit)
        now = self._begin(REDUCING, samples, error=error, new=min(unreduced, default=None))
        self._complete(now, unreduced, given)
        self._unsynced.clear()
        self._statistics.seconds_communicating += time.perf_counter() - started

    def _fits(self, index: int) -> bool:
        gradient = self._parameters[index].grad
        return gradient is None or self._buckets.memories[self._buckets.homes[index]].fits(index, gradient)

    def note_step(self) -> None:
        """Notes that the optimiser has taken its step: gradients that are new from now on have not been reduced."""
        self._record.note_step()
        self.unspent = None

    def forget(self) -> None:
        """Notes that `zero_grad` has taken away or emptied the gradients."""
        self._record.forget()
        self._refused = False

    def follow_arrival(self, order: list[int]) -> None:
        """Cuts buckets that fill in this order of parameters; between two rounds, alike on all ranks."""
        if self._fixed:
            return
        self.arrival = order
        self._buckets = make_buckets(self._collectives, self._named, self._bucket_nbytes, order)
        self._header.fingerprint = self._buckets.fingerprint ^ self._followed
        self._renewed()

    def _renewed(self) -> None:
        """Makes what belongs to buckets that were cut anew."""
        self._statistics.forget_buckets()
        self._trailer = StepTrailer(self._collectives, len(self._named), len(self._buckets.memories))

    # For the optimiser above.

    def watch(self, drift: Drift) -> None:
        """Compares the ranks' replicas in every header from now on; alike on all ranks."""
        self._header.drift = drift

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

    def _accumulated(self) -> set[int]:
        """Returns the parameters with a gradient from `no_sync`; `zero_grad` may have thrown some away since."""
        return {index for index in self._unsynced if self._parameters[index].grad is not None}

    def join(self, answer: Callable[[Header], None] | None = None) -> None:
        """Takes part in the other ranks' rounds without gradients until every rank has called `join`.

        Args:
            answer: takes part in what the other ranks do together outside backward.
        """
        while True:
            header = self._complete(self._begin(FINISHED, None), set())
            if header.doing == FINISHED:
                return
            if header.doing != STEPPING and answer is not None:
                answer(header)

    def announce(self, doing: int, error: int = 0) -> Header:
        """Waits until all ranks have come to do this, or are in `finish()`; a collective outside backward.

        Args:
            doing: what; a state of `header`.
            error: number of an error that the check beside the signature's can word; 0: none.
        """
        header = self._start_header(doing, self.samples, error=BothChecks.others(error))(True)
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
