"""What local SGD algorithms share: local steps, and after each communication window a round of averaging."""

from __future__ import annotations

import json
import time
import zlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import MismatchError, RankFailedError
from mpidl.mpi import exit_protocol
from mpidl.mpi.agreement import disagreement
from mpidl.optim import closures, flat, validation
from mpidl.optim.flat import Flat
from mpidl.optim.local_steps import LocalSteps
from mpidl.optim.models import Model
from mpidl.synchronous.local_sgd.window_weight import WindowWeight, shares
from mpidl.synchronous.reduction.statistics import Statistics

_NONE, _PUT_BACK, _WRITTEN = range(3)  # what the user has written since the last round; the last and above
_NOTHING, _GRADIENTS, _PARAMETERS = range(3)  # what a rank brings to a round; a rank in `finish()` asks for none itself


class Periodic(LocalSteps):
    """Base of `ModelAveraging` and `DiLoCo`: the user's optimiser takes local steps and keeps its state on its rank.

    Rounds keep ranks together whose loaders differ in length: a rank in `finish()` takes part in the rounds of the
    other ranks. The mean is that of the ranks that took steps since the last round. A rank whose parameters hold an
    infinity or a NaN is left out of the mean, counts the round in `statistics.nonfinite_rounds`, and goes on from the
    mean.

    Args:
        optimizer: takes the local steps; holds parameters of `model` only.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
        communication_window: local steps per round.
        warmup_steps: number of first steps at each of which the gradients are averaged.
        comm: communicator of the ranks that train together; default `mpidl.world()`.
        buffers: "mean": `finish()` averages BatchNorm statistics and other floating buffers; "local": leaves them.
        own: further hyperparameters of the subclass, see `mpidl.optim.validation`; alike on all ranks.

    Raises:
        ArgumentError: an argument cannot work, or optimiser and model do not belong together; alike on all ranks.
        DtypeError: a parameter is not floating, or on a device that cannot be used.
        MismatchError: the ranks gave different models or arguments.
    """

    _takes_writes: ClassVar[bool] = False  # whether the mean of parameters that the user has written is what is meant

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Model,
        *,
        communication_window: int,
        warmup_steps: int = 0,
        comm: Communicator | None = None,
        buffers: str = "mean",
        **own: Any,
    ) -> None:
        self._window_length, self._warmup = communication_window, warmup_steps
        common = {"communication_window": communication_window, "warmup_steps": warmup_steps, "buffers": buffers}
        self._hyperparameters = {**common, **own}
        error = validation.problem(type(self), self._hyperparameters)
        error = error or closures.curvature_problem(optimizer, type(self).__name__)
        super().__init__(optimizer, model, comm=comm, buffers=buffers, error=error)
        self.statistics = Statistics()
        self._lay_out()
        self._group = Communicator(self._ranks.data)
        self._steps = 0  # local steps since the ranks last held the same parameters
        self._error = 0  # the number of an error that this rank has found, for all ranks
        self._written: dict[str, int] = {}  # parameters that the user has written since the last round
        self._used: np.ndarray[Any, Any] = np.zeros(len(self._held), bool)  # of a warm-up step: by some rank
        self._weight = WindowWeight()  # of these steps
        self._stop_wished = False
        self.stopping = False

    def _describe(self) -> dict[str, Any]:
        return self._hyperparameters

    def _alike_now(self) -> bool:
        return not self._ranks.gather_words(np.array([self._steps], np.int64), "verify").any()

    @abstractmethod
    def _next(self, mean: Flat) -> Flat:
        """Returns the parameters from which all ranks go on, given the ranks' mean; may overwrite `mean`."""

    @abstractmethod
    def common_state(self) -> dict[str, Flat]:
        """Returns the state besides the parameters that is alike on all ranks, as `finish()` would leave it.

        Call `averaged` first.
        """

    def step(self, closure: Any = None) -> Any:
        """Takes a local step; after `communication_window` local steps, averages with all ranks.

        Args:
            closure: zeroes gradients, runs forward and backward, and returns the loss; None: backward has run already.

        Returns:
            The loss of this rank that the closure returned; None without a closure.

        Raises:
            ArgumentError: some steps or ranks used `samples` and others did not; or, in a step of `warmup_steps`, the
                optimiser may evaluate the closure several times.
            ArgumentError: a rank's parameters were written outside a step, see `broadcast_parameters`, or have changed:
                on all ranks, in the next round.
            ClosedError: `finish()` was called.
            MismatchError: only some ranks have written a parameter outside a step; on all ranks, in the next round.
            RankFailedError: a thread of this process ended by an exception.
        """
        self._refuse(closure)
        failed = exit_protocol.thread_failure()
        if failed is not None:
            raise RankFailedError(f"rank {self._ranks.rank}: {failed}")
        self._notice_writes()
        if self._error:
            self._round(_PARAMETERS, None, WindowWeight())  # all ranks raise the error
        count = self._begin_step(closure)
        warming_up, moves = self.statistics.steps < self._warmup, count != 0
        if warming_up:
            self._refuse_several_evaluations("warmup_steps averages the gradients before the step")
            applied = self._round(_GRADIENTS, self._gradients(), WindowWeight(count))
            moves = moves or bool(applied)
        try:
            if moves:
                self._step_inner()
        finally:
            self._writes.note()
        self.statistics.steps += 1
        self._steps += 1
        self._weight.add(self._end_count(count))
        if self.statistics.steps == self._warmup:
            self._window_ends()  # all ranks hold the same parameters
        if self._steps == self._window_length and self.statistics.steps > self._warmup:
            self._round(_PARAMETERS, self._flat(), self._weight)
        return self._end_step()

    def _window_ends(self) -> None:
        self._steps, self._weight = 0, WindowWeight()

    def averaged(self) -> dict[str, torch.Tensor]:
        """Returns the parameters that `finish()` would leave now, by name, and changes none; a collective.

        Raises:
            ArgumentError, MismatchError: as `step`.
        """
        self._notice_writes()
        mine = self._new() if self._error else self._flat()
        present = self._has_steps and not self._error
        everyone = self._look_at([bool(np.isfinite(mine).all()), present, *self._weight.words()])
        finite, present, kinds, weights = everyone[:, :4].T
        shared = shares(kinds, weights, present.astype(bool)) * finite
        if shared.any():
            mine = self._like(self._foreseen(self._mean(mine, shared)))
        return self.named(mine)

    def request_stop(self) -> None:
        """Notes this rank's wish to stop; after the next round `stopping` is True on every rank."""
        self._stop_wished = True

    def own_state(self) -> dict[str, Flat]:
        """Returns this rank's own state between rounds besides the inner optimiser's, as flat arrays by name."""
        return {
            "parameters": self._flat(),
            "steps": np.array([self._steps]),
            "weight": np.array(self._weight.state),
        }

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        """Goes on from what `own_state` returned; every rank must call this, each with its own state."""
        self._start_from(saved["parameters"])
        self._steps = int(saved["steps"][0])
        self._weight.state = [int(n) for n in saved.get("weight", (self._steps, 0, 0))]

    def restore_common_state(self, saved: Mapping[str, Flat]) -> None:
        """Goes on from what `common_state` returned, with another number of ranks than the one that saved it."""

    # What the user has written.

    def _give_up_steps(self) -> None:
        self._window_ends()
        self._error = 0
        self._written.clear()

    def _start_anew(self, values: Flat) -> None:
        pass

    def _notice_writes(self) -> None:
        """Notes a parameter that was written or changed; all ranks learn of it in the next round."""
        number = self._writes.check()
        if number and self._takes_writes and not self._writes.changed():
            # Where all ranks held the same before, the same must have been written; within a window values differ.
            alike = not self._steps or self.statistics.steps < self._warmup
            values = zlib.crc32(self._writes.values()) if alike else 0
            for name in self._writes.written():
                self._written.setdefault(name, values)
            self._writes.note()
            number = 0
        self._error = self._error or number

    @property
    def _has_steps(self) -> bool:
        """Whether this rank's parameters hold what other ranks have not seen."""
        return self._steps > 0 or bool(self._written)

    def _look_at(self, words: list[int]) -> np.ndarray[Any, Any]:
        """Returns everybody's words, if no rank has found an error and those that bring parameters wrote the same.

        Args:
            words: of this rank; the second is whether this rank brings something.
        """
        written = _NONE if not self._writes.put_back else _PUT_BACK
        if self._written:
            written = _WRITTEN + zlib.crc32(json.dumps(sorted(self._written.items())).encode())
        everyone: np.ndarray[Any, Any] = self._group.allgather(np.array([*words, self._error, written], np.int64))
        errors, writes = everyone[:, -2], everyone[:, -1][everyone[:, 1] > 0]
        if errors.any():
            self._error = 0  # told; what is wrong is found again
            raise self._writes.describe_error(int(errors[errors > 0][0]))
        wrote = writes[writes >= _WRITTEN]
        if wrote.size and ((wrote != wrote[0]).any() or (writes == _NONE).any()):
            texts = self._ranks.gather_bytes(", ".join(self._written).encode(), "naming what was written")
            found = disagreement(text.decode() or "none" for text in texts)
            raise MismatchError(
                f"parameters were written outside a step, and not alike on all ranks: {found}; write the same on all "
                "ranks, or call broadcast_parameters() on all of them after the write, or, if it belongs to each local "
                "step, write in a hook of register_step_post_hook()"
            )
        return everyone

    # Rounds.

    def _round(self, kind: int, mine: Flat | None, weight: WindowWeight) -> bool | None:
        """Averages what the ranks bring; returns whether some of it counted, and None if no rank brought anything.

        Args:
            kind: which of the two this rank brings; _NOTHING in `finish()`.
            mine: this rank's gradients or parameters, flat; None: this rank has none.
            weight: of these.
        """
        started = time.perf_counter()
        finite = mine is not None and bool(np.isfinite(mine).all())
        words = [kind, mine is not None, finite, self._stop_wished, *weight.words()]
        kinds, present, fine, stops, units, weights = self._look_at(words)[:, :6].T
        self.stopping = self.stopping or bool(stops.any())
        agreed = int(kinds.max())
        if agreed == _NOTHING and present.any():
            agreed = _PARAMETERS  # all ranks are in `finish()`, some with steps that no other rank has seen
        here = present.astype(bool) & ((kinds == _GRADIENTS) if agreed == _GRADIENTS else True)
        shared = shares(units, weights, here) * fine
        if agreed != _NOTHING and shared.any():
            self.statistics.bytes += self._layout.count * np.dtype(self._layout.dtype).itemsize
            if agreed == _GRADIENTS:
                self._note_used(bool(shared[self._ranks.rank]))
            self._apply(agreed, kind, self._mean(mine, shared))
        if agreed == _PARAMETERS:
            self._window_ends()  # also if no rank's parameters were finite
            self._written.clear()
            self._writes.put_back = False
        self.statistics.nonfinite_rounds += mine is not None and not finite
        self.statistics.rounds += agreed != _NOTHING
        self.statistics.seconds_communicating += time.perf_counter() - started
        return None if agreed == _NOTHING else bool(shared.any())

    def _apply(self, agreed: int, kind: int, mean: Flat) -> None:
        if agreed == _PARAMETERS:
            self._start_from(self._next(mean))
        elif kind == _GRADIENTS:
            self._take_gradients(mean)

    def _mean(self, mine: Flat | None, shares: Any) -> Flat:
        """Returns the mean of all ranks' arrays, weighed by their shares; a collective."""
        share = int(shares[self._ranks.rank])
        total = self._sum(None if mine is None or not share else mine if share == 1 else mine * mine.dtype.type(share))
        total /= int(shares.sum())
        return total

    def _sum(self, mine: Flat | None) -> Flat:
        given = np.zeros(self._layout.count, self._layout.dtype) if mine is None else mine
        total = self._new()
        self._group.allreduce(given, "sum", out=total)
        return total

    def _gradients(self) -> Flat:
        """Returns the gradients, flat, in which a parameter without a gradient counts as zeros."""
        given = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for _, p in self._held]
        ordered = [g.permute(order).contiguous() for g, order in zip(given, self._orders, strict=True)]
        return flat.pack(self._layout, ordered)

    def _note_used(self, giving: bool) -> None:
        """Finds out which parameters have a gradient on some rank that gives gradients; a collective."""
        mine = np.array([giving and p.grad is not None for _, p in self._held], np.uint8)
        self._used = self._group.allgather(mine).any(axis=0)

    def _take_gradients(self, mean: Flat) -> None:
        """Makes the mean the gradients; a parameter that no rank used keeps its gradient, mostly None."""
        for used, (_, p) in zip(self._used, self._held, strict=True):
            if used and p.grad is None:
                p.grad = torch.zeros_like(p, requires_grad=False)
        targets = [
            p.grad.detach() if used and p.grad is not None else torch.empty_like(p)
            for used, (_, p) in zip(self._used, self._held, strict=True)
        ]
        flat.unpack(self._layout, mean, [t.permute(o) for t, o in zip(targets, self._orders, strict=True)])

    def _foreseen(self, mean: Flat) -> Flat:
        """Returns the parameters that `_next` would return, and leaves the algorithm's state as it is."""
        return self._next(mean)

    def _close(self) -> None:
        """Brings the steps since the last round, and takes part in rounds until no rank brings any more."""
        self._notice_writes()
        brought = self._flat() if self._has_steps and not self._error else None
        while self._round(_NOTHING, brought, self._weight) is not None:
            brought = self._flat() if self._has_steps and not self._error else None
        self._group.free()

    def _start_from(self, values: Flat) -> None:
        flat.unpack(self._layout, self._like(values), self._views())
        self._writes.note()
