"""Synchronous SGD: every rank's `p.grad` becomes the mean over all ranks at the end of backward.

The step itself is the user's own optimiser's; the reduction stands in `reducer`.
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
    """Allreduce-based synchronous SGD over any torch optimiser (mini-batch parallelism; Goyal et al. 2017).

    After `backward()` each parameter's `grad` is the mean of all ranks' gradients, so that clipping, logging,
    GradScaler and several backward calls per step work unchanged. With a loss that is a mean, n ranks with a batch of m
    each take the step that one rank takes with the n*m samples together. A parameter that was used on no rank keeps
    its gradient (mostly None); one used on some ranks gets the mean over all of them.

    Args:
        optimizer: holds parameters of `model` only; alike on all ranks, hyperparameters too.
        model: its parameters and buffers are broadcast from rank 0, in place, and so is the optimiser's state. Backward
            must run on what calling this module returned, or reach its parameters directly.
        comm: who trains together; default `mpidl.world()`.
        shard: the ranks of a node share one copy of the weights, and each takes the optimiser's step on its own pieces
            of them, whose state it alone holds; docs/optimizers.md says what that changes. Elementwise optimisers of
            torch.optim and parameters on the cpu only.
        bucket_cap_mb: gradients are reduced in buckets of at most this many MiB while backward goes on.
        wire_dtype: torch.bfloat16 lets float32 gradients travel in that dtype between nodes, in buckets from 256 KiB on
            (smaller ones if that is faster; with `shard` all); sums are taken in float32. None: as they are.
        buffers: "mean" averages BatchNorm statistics and other floating buffers in `finish()`; "local" leaves them.

    Raises:
        ArgumentError: optimiser and model do not belong together, or an argument cannot work; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or they lie
            on several devices.
        MismatchError: the ranks gave different models, optimisers or arguments.
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
        """Takes the inner optimiser's step; the gradients are already the means.

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
        """GradScaler asks for this before it looks at gradients, of which it would see none here."""
        if self._sharded is not None:
            raise ArgumentError(
                "GradScaler cannot see the gradients of shard=True: train in bfloat16, or without shard"
            )
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the inner optimiser's; with `shard` gradients always become None."""
        if self._sharded is not None:
            self._sharded.zero_grad()
        super().zero_grad(set_to_none or self._sharded is not None)

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimiser's state in torch's form; with `shard` that of this rank's pieces."""
        return super().state_dict()

    def full_state_dict(self) -> dict[str, Any]:
        """Returns, on every rank, the state of the same optimiser without `shard`; with `shard` a collective."""
        if self._sharded is None:
            return super().state_dict()
        if self._finished:
            raise ClosedError("full_state_dict: finish() was called; save before it")
        self._reducer.check_whole("full_state_dict")
        return self._sharded.full_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads into the inner optimiser; load the same on every rank.

        Args:
            state_dict: a full one, of any number of ranks; or with `shard` this rank's own part.
        """
        if self._sharded is None:
            super().load_state_dict(state_dict)
        else:
            self._sharded.load_state_dict(state_dict)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward inside accumulates this rank's own gradients only; the next one outside reduces the sum."""
        before, self._reducer.synchronising = self._reducer.synchronising, False
        try:
            yield
        finally:
            self._reducer.synchronising = before

    @contextmanager
    def samples(self, count: int) -> Iterator[None]:
        """Backward inside weighs this rank's gradient by its number of samples, for batches that differ in size.

        Use it on all ranks or on none. What was accumulated under `no_sync` is weighed along with it.

        Args:
            count: samples behind this rank's mean loss; 0 leaves this rank out of the mean.
        """
        if not isinstance(count, int) or count < 0:
            raise ArgumentError(f"samples({count!r}): expected a whole number of samples, 0 or more")
        before, self._reducer.samples = self._reducer.samples, count
        try:
            yield
        finally:
            self._reducer.samples = before

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clips the norm of all gradients together, as torch's function of that name; returns the norm before.

        With `shard` a collective, and equal to torch's to round-off.
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
        """In which order buckets fill, by index of the trained parameters; None before the first backward.

        Set it, alike on all ranks, to take over another run's: the sums of several nodes may depend on it in their last
        bits. None for good with `shard`, and where `MPIDL_DETERMINISTIC=1` lets nothing depend on what was observed.
        """
        return self._reducer.arrival

    @arrival.setter
    def arrival(self, order: list[int]) -> None:
        if sorted(order) != list(range(len(self._held))):
            raise ArgumentError(f"arrival={order!r}: expected each index below {len(self._held)} once")
        self._reducer.follow_arrival(order)

    def finish(self) -> None:
        """Ends training; a collective, harmless the second time.

        A rank that comes early answers the others' steps without samples of its own until all are there (torch calls
        this Join). If batches were uneven, the parameters and the optimiser's state of a rank that stepped last are
        then copied to all, so that every rank holds the same model.
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

    It must not tie the model to this process: in a copy or a pickle of the model it does nothing.
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
