"""Synchronous SGD: every rank's `p.grad` becomes the mean over all ranks at the end of backward.

The user's own optimiser takes the step; `reduction` reduces the gradients.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from mpidl.collectives import Collectives
from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError, ClosedError
from mpidl.native import environment
from mpidl.optim import closures, models, sample_counts, state
from mpidl.optim.module_calls import ModuleCalls
from mpidl.optim.signature import Signature
from mpidl.synchronous.drift import Drift
from mpidl.synchronous.mean_loss import MeanLoss
from mpidl.synchronous.reduction.after_forward import after_forward
from mpidl.synchronous.reduction.header import BROADCASTING, EVALUATING, Header
from mpidl.synchronous.reduction.reducer import Reducer
from mpidl.synchronous.reduction.statistics import Statistics
from mpidl.synchronous.replicas import Replicas
from mpidl.synchronous.sharded import state as sharded_state
from mpidl.synchronous.sharded.step import Sharded


class Synchronous(Replicas):
    """Averages the gradients of all ranks during backward, for any torch optimiser (synchronous SGD).

    After `backward()` each parameter's `grad` is the mean of all ranks' gradients, so that clipping, logging,
    GradScaler and several backward calls per step work unchanged. With a loss that is a mean, n ranks with a batch of m
    samples each take the step that one rank takes with the n*m samples together. A parameter that no rank used keeps
    its gradient (mostly None); a parameter that some ranks used gets the mean over all ranks.

    Source: P. Goyal et al., *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*, 2017; `shard`: S. Rajbhandari
    et al., *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*, 2020.

    Args:
        optimizer: holds parameters of `model` only; alike on all ranks, hyperparameters too. Rank 0's state is
            broadcast.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
            Backward must run on the output of a call of a module, or reach the parameters directly.
        comm: communicator of the ranks that train together; default `mpidl.world()`.
        bucket_cap_mb: largest size in MiB, above 0, of a bucket of gradients, which are reduced during backward.
        wire_dtype: torch.bfloat16: float32 gradients are sent between nodes in that dtype and summed in float32, in
            buckets of 256 KiB or more (smaller ones where that is faster; with `shard` all). None: no conversion.
        shard: the ranks of a node share one copy of the weights; each rank takes the optimiser's step on its own pieces
            of the weights and alone holds the state of those pieces. Needs an elementwise optimiser of torch.optim and
            parameters on the cpu; docs/optimizers.md lists what changes.
        buffers: "mean": `finish()` averages BatchNorm statistics and other floating buffers over the ranks; "local":
            each rank keeps its own.

    Raises:
        ArgumentError: an argument cannot work, or optimiser and model do not belong together; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or the
            parameters lie on several devices.
        MismatchError: the ranks gave different models, optimisers or arguments.
        SharedMemoryError: with `shard`, a node has too little shared memory for the weights; alike on all ranks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: models.Model,
        *,
        comm: Communicator | None = None,
        bucket_cap_mb: float = 25,
        wire_dtype: torch.dtype | str | None = None,
        shard: bool = False,
        buffers: str = "mean",
    ) -> None:
        self._bucket_cap_mb, self._shard = bucket_cap_mb, shard
        self._wire_dtype = str(wire_dtype or "").removeprefix("torch.")
        self._sharded: Sharded | None = None
        self.statistics = Statistics()
        error = None
        if not isinstance(bucket_cap_mb, int | float) or not 0 < bucket_cap_mb < math.inf:
            error = ArgumentError(f"bucket_cap_mb={bucket_cap_mb!r}; expected a number of MiB above 0")
        if self._wire_dtype not in ("", "bfloat16"):
            error = ArgumentError(f"wire_dtype={wire_dtype!r}; expected None or torch.bfloat16")
        if shard not in (True, False):
            error = ArgumentError(f"shard={shard!r}; expected True or False")
        super().__init__(optimizer, model, comm=comm, buffers=buffers, error=error)
        if shard:
            self._no_step_alone.remove()  # the optimiser of pieces has a hook of its own
        after = partial(after_forward, self._reducer)
        self._calls = [ModuleCalls(module, after=after) for module in models.called(self._model)]

    def _broadcast(self) -> None:
        super()._broadcast()
        state.broadcast_optimizer(self._ranks, self._inner, 0)
        nbytes = max(1, int(self._bucket_cap_mb * 2**20))
        collectives = Collectives(self._ranks, wire_dtype=self._wire_dtype, progress_thread=self._ranks.spares_cores())
        signature = Signature(self._inner, self._model, self._held, self._frozen, fixed=bool(self._shard))
        seen: dict[str, Any] = {"signature": signature, "modules": list(self._model.modules())}
        if self._shard:
            self._sharded = Sharded(collectives, self._inner, self._model, self._held, nbytes)
            self._reducer = self._sharded.reducer(self._held, nbytes, self.statistics, **seen)
            self._release = weakref.finalize(self, self._sharded.release)  # if finish() never comes
        else:
            self._reducer = Reducer(collectives, self._held, nbytes, self.statistics, **seen)
        inner = self._inner  # not self: the model's hook holds the reducer, and must not keep this optimiser alive
        self._drift = Drift(self._ranks, self._held, lambda: inner.param_groups)
        self._reducer.watch(self._drift)
        self._mean_loss = MeanLoss(self._reducer, self._ranks, needed=isinstance(self._inner, torch.optim.LBFGS))

    def _describe(self) -> dict[str, Any]:
        own = {"bucket_cap_mb": self._bucket_cap_mb, "buffers": self._buffers, "shard": self._shard}
        own["wire_dtype"] = self._wire_dtype
        environment.HELPER.read()
        if self._shard:
            sharded_state.refuse(self._inner, self._held)
        return own | state.describe_optimizer(self._inner, self._model)

    def step(self, closure: Any = None) -> Any:
        """Takes the inner optimiser's step on the mean gradients; with `shard` a collective.

        Gradients that no backward has reduced are reduced first, as `reduce` does: those that were accumulated under
        `no_sync` only, and those that the program has set, such as the ones of `torch.autograd.grad`. A parameter whose
        gradient a backward has reduced since the last step keeps the gradient that it has now, clipped or replaced.

        Args:
            closure: zeroes gradients, runs forward and backward, and returns the loss. LBFGS, and optimisers that are
                not torch's, may evaluate it several times and decide by the loss: it is then the mean over all ranks.

        Returns:
            The loss that the closure returned.

        Raises:
            ArgumentError: LBFGS got no loss, or the model has changed in a way that cannot be followed.
            ClosedError: `finish()` was called, or a backward was interrupted half-way.
            MismatchError: the ranks have come apart: only some set gradients, or changed the model.
        """
        self._refuse(closure)
        for calls in self._calls:
            calls.watch()
        loss = None
        if closure is None:
            self._reducer.reduce_missing("step")
        elif self._sharded is not None:
            loss = self._evaluated(closure)
        if self._sharded is None:
            loss = self._step_inner(closure if closure is None else partial(self._evaluated, closure))
        else:
            self._sharded.step()
        self._reducer.note_step()
        self.statistics.steps += 1
        self._drift.after_step(self.statistics.steps)
        return loss

    def _evaluated(self, closure: closures.Closure) -> Any:
        """Returns the loss of a closure whose gradients have been reduced."""
        if not closures.evaluates_once(self._inner):
            return self._mean_loss.evaluated(closure)
        loss = closures.evaluated(closure)
        self._reducer.reduce_missing("step")
        return loss

    def reduce(self) -> None:
        """Makes the gradients that no backward has reduced the mean over all ranks; a collective, before `step()`.

        `step()` does so by itself. Call `reduce` first where something reads or clips gradients that the program has
        set: those of `torch.autograd.grad`, of `torch.func.grad`, of another model or of no model. They are weighed
        like others: by the last `samples` since the last step. Gradients that a backward has reduced stay as they are.

        Raises:
            ClosedError: `finish()` was called, or a backward was interrupted half-way.
            DtypeError: some rank's gradient of a parameter is sparse, or has not its parameter's dtype.
            MismatchError: the ranks have come apart, or their models differ.
        """
        if self._finished:
            raise ClosedError("reduce: finish() was called on this mpidl.Synchronous")
        self._reducer.reduce()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Calls `zero_grad` of the inner optimiser.

        Args:
            set_to_none: whether gradients become None; False: zeros.
        """
        if self._sharded is not None and set_to_none:
            self._sharded.zero_grad()
        super().zero_grad(set_to_none)
        self._reducer.forget()

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimiser's state in torch's form; with `shard` that of this rank's pieces."""
        return super().state_dict()

    def full_state_dict(self) -> dict[str, Any]:
        """Returns, on every rank, the state that the optimiser has without `shard`; with `shard` a collective.

        Raises:
            ClosedError: `finish()` was called, or a backward was interrupted half-way; with `shard` only.
        """
        if self._sharded is None:
            return super().state_dict()
        if self._finished:
            raise ClosedError("full_state_dict: finish() was called; save before it")
        self._reducer.check_whole("full_state_dict")
        return self._sharded.full_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state into the inner optimiser, on every rank.

        Args:
            state_dict: a full state, the same on every rank and saved by any number of ranks; or, with `shard`, this
                rank's own part.

        Raises:
            ArgumentError: with `shard`: the state is another rank's part, or a tensor has not its parameter's shape.
        """
        if self._sharded is None:
            super().load_state_dict(state_dict)
        else:
            self._sharded.load_state_dict(state_dict)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Makes backward inside accumulate this rank's gradients only; the next backward outside reduces their sum.

        If no backward outside follows, `step()` reduces it.
        """
        before, self._reducer.synchronising = self._reducer.synchronising, False
        try:
            yield
        finally:
            self._reducer.synchronising = before

    @contextmanager
    def samples(self, count: int) -> Iterator[None]:
        """Makes backward inside weigh this rank's gradient by its number of samples, for batches that differ in size.

        Use `samples` on all ranks or on none. Gradients accumulated under `no_sync` get the same weight.

        Args:
            count: number of samples in this rank's mean loss; 0 leaves this rank out of the mean.

        Raises:
            ArgumentError: `count` is not a whole number, 0 or more.
        """
        sample_counts.refuse(count)
        before, self._reducer.samples = self._reducer.samples, count
        self._reducer.unspent = count
        try:
            yield
        finally:
            self._reducer.samples = before

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clips the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_` does.

        Gradients that no backward has reduced are reduced first, as in `step()`. With `shard` a collective, whose norm
        equals torch's up to round-off.

        Args:
            max_norm: largest 2-norm after clipping.

        Returns:
            The norm before clipping, of one element.
        """
        self._reducer.reduce_missing("clip_grad_norm_")
        if self._sharded is None:
            return super().clip_grad_norm_(max_norm)
        return self._sharded.clip_grad_norm_(max_norm)

    def request_stop(self) -> None:
        """Notes this rank's wish to stop; after the next backward `stopping` is True on every rank."""
        self._reducer.wish_to_stop = True

    @property
    def stopping(self) -> bool:
        """Whether some rank wished to stop before the last backward; equal on all ranks."""
        return self._reducer.stopping

    @property
    def arrival(self) -> list[int] | None:
        """The order in which buckets fill, by index of the trained parameters; None before the first backward.

        Assign the order of another run, alike on all ranks, to get that run's sums: the last bits of sums over several
        nodes may depend on the order. Always None with `shard` and with `MPIDL_DETERMINISTIC=1`, which keep the order
        of the model.

        Raises:
            ArgumentError: the assigned order does not have each index once.
        """
        return self._reducer.arrival

    @arrival.setter
    def arrival(self, order: list[int]) -> None:
        if sorted(order) != list(range(len(self._held))):
            raise ArgumentError(f"arrival={order!r}: expected each index below {len(self._held)} once")
        self._reducer.follow_arrival(order)

    def finish(self) -> None:
        """Ends training; a collective, harmless the second time.

        A rank that calls `finish` early takes part in the steps of the other ranks without samples, until all ranks
        have called it (torch calls this Join). If some rank took fewer steps, the parameters and the optimiser's state
        of a rank that took all steps are then copied to every rank, so that all ranks hold the same model.

        Raises:
            ClosedError: a backward was interrupted half-way.
        """
        super().finish()

    def broadcast_parameters(self) -> None:
        """Makes all ranks start anew from rank 0's parameters and buffers; a collective.

        Call it on every rank after weights were written outside a step, by `load_state_dict` or a reset. The
        optimiser's state is kept, and so are gradients. With `shard` the ranks of a node write one memory: all of them
        must have written the same before the call.

        Raises:
            ArgumentError: with `shard`: a parameter has left the memory that the ranks share.
            ClosedError: `finish()` was called, or a backward was interrupted half-way.
            MismatchError: shapes or dtypes differ between ranks, or the other ranks do something else.
        """
        self._refuse_closed("broadcast_parameters")
        self._reducer.check_whole("broadcast_parameters")
        if self._sharded is not None:
            self._sharded.weights.note_written()
        self._reducer.announce(BROADCASTING)
        self._broadcast_now()

    def _broadcast_now(self) -> None:
        """Does this rank's part of `broadcast_parameters`."""
        if self._sharded is None:
            self._broadcast_model()
        else:
            with self._sharded.weights.own_memory():
                self._broadcast_model()

    def _answer(self, header: Header) -> None:
        """Does this rank's part of what the other ranks do, while this rank is in `finish()`."""
        if header.doing == BROADCASTING:
            self._broadcast_now()
        elif header.doing == EVALUATING:
            self._mean_loss.answer()
        else:
            super()._answer(header)

    def _close(self) -> None:
        self._reducer.check_whole("finish")
        self._reducer.join(self._answer)
        self._drift.close()
        if self._sharded is not None:
            self._release()
            self._sharded.free()
        self._reducer.close()
        for calls in self._calls:
            calls.remove()
