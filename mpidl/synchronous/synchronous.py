"""Synchronous SGD: every rank's `p.grad` becomes the mean over all ranks at the end of backward.

The user's own optimiser takes the step; `reduction` reduces the gradients.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree

from mpidl.collectives import Collectives
from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError, ClosedError
from mpidl.native import environment
from mpidl.optim import state
from mpidl.optim.optimizer import DistributedOptimizer
from mpidl.synchronous.reduction.reducer import Reducer
from mpidl.synchronous.reduction.statistics import Statistics
from mpidl.synchronous.sharded import state as sharded_state
from mpidl.synchronous.sharded.step import Sharded


class Synchronous(DistributedOptimizer):
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
        model: its parameters and buffers are broadcast from rank 0, in place. Backward must run on the output of a call
            of this module, or reach the module's parameters directly.
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
        model: torch.nn.Module,
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
        self._forward_hook = model.register_forward_hook(_AfterForward(self._reducer))

    def _broadcast(self) -> None:
        super()._broadcast()
        state.broadcast_optimizer(self._ranks, self._inner, 0)
        nbytes = max(1, int(self._bucket_cap_mb * 2**20))
        collectives = Collectives(self._ranks, wire_dtype=self._wire_dtype, progress_thread=self._ranks.spares_cores())
        if self._shard:
            self._sharded = Sharded(collectives, self._inner, self._model, self._held, nbytes)
            self._reducer = self._sharded.reducer(self._held, nbytes, self.statistics)
            self._release = weakref.finalize(self, self._sharded.release)  # if finish() never comes
        else:
            self._reducer = Reducer(collectives, self._held, nbytes, self.statistics)

    def _describe(self) -> dict[str, Any]:
        own = {"bucket_cap_mb": self._bucket_cap_mb, "buffers": self._buffers, "shard": self._shard}
        own["wire_dtype"] = self._wire_dtype
        environment.HELPER.read()
        if self._shard:
            sharded_state.refuse(self._inner, self._held)
        return own | state.describe_optimizer(self._inner, self._model)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes the inner optimiser's step on the mean gradients; with `shard` a collective.

        Raises:
            ArgumentError: a closure was given, or gradients were accumulated under `no_sync` only.
            ClosedError: `finish()` was called, or a backward was interrupted half-way.
        """
        self._refuse(closure)
        self._reducer.check_steppable()
        if self._sharded is None:
            self._inner.step()
        else:
            self._sharded.step()
        self.statistics.steps += 1

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """False; refused with `shard`, since GradScaler, which asks for this first, would find no gradients."""
        if self._sharded is not None:
            raise ArgumentError(
                "GradScaler cannot see the gradients of shard=True: train in bfloat16, or without shard"
            )
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Calls `zero_grad` of the inner optimiser.

        Args:
            set_to_none: whether gradients become None; False: zeros. With `shard` gradients always become None.
        """
        if self._sharded is not None:
            self._sharded.zero_grad()
        super().zero_grad(set_to_none or self._sharded is not None)

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
        """Makes backward inside accumulate this rank's gradients only; the next backward outside reduces their sum."""
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
        if not isinstance(count, int) or count < 0:
            raise ArgumentError(f"samples({count!r}): expected a whole number of samples, 0 or more")
        before, self._reducer.samples = self._reducer.samples, count
        try:
            yield
        finally:
            self._reducer.samples = before

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clips the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_` does.

        With `shard` a collective, whose norm equals torch's up to round-off.

        Args:
            max_norm: largest 2-norm after clipping.

        Returns:
            The norm before clipping, of one element.
        """
        if self._sharded is not None:
            self._reducer.check_steppable()
            return self._sharded.clip_grad_norm_(max_norm)
        return torch.nn.utils.clip_grad_norm_([p for _, p in self._held], max_norm)

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

    def _close(self) -> None:
        self._reducer.check_whole("finish")
        self._reducer.join(None if self._sharded is None else self._sharded.answer)
        if self._sharded is not None:
            self._release()
            self._sharded.free()
        elif self._reducer.uneven is not None:
            state.broadcast_model(self._ranks, self._model, self._reducer.uneven)
            state.broadcast_optimizer(self._ranks, self._inner, self._reducer.uneven)
        self._reducer.close()
        self._forward_hook.remove()


class _AfterForward:
    """The model's forward hook: makes the backward of each output end with the reduction.

    In a copy or a pickle of the model the hook does nothing, so that the model is not tied to this process.
    """

    def __init__(self, reducer: Reducer | None = None) -> None:
        self._reducer = reducer

    def __reduce__(self) -> tuple[type[_AfterForward], tuple[()]]:
        return _AfterForward, ()

    def __call__(self, model: torch.nn.Module, inputs: Any, output: Any) -> None:
        reducer = self._reducer
        if reducer is None or not torch.is_grad_enabled():
            return
        reducer.before_forward()
        for leaf in _pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.grad_fn is not None:
                leaf.register_hook(lambda _: reducer.before_backward())  # type: ignore[no-untyped-call]
