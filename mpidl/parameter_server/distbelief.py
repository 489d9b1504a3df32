"""DistBelief: Dean's own Downpour SGD. Workers push gradients, and the server's Adagrad makes steps of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError
from mpidl.optim import flat
from mpidl.optim.flat import Flat
from mpidl.optim.models import Model
from mpidl.optim.validation import NonNegativeInt, PositiveFloat, PositiveInt, given
from mpidl.optim.written import WriteCheck
from mpidl.parameter_server.center.center import Requirements
from mpidl.parameter_server.worker import overlap as overlapping
from mpidl.parameter_server.worker import sgd
from mpidl.parameter_server.worker.base import Worker
from mpidl.parameter_server.worker.exchange import Exchange
from mpidl.parameter_server.worker.warm_start import WarmStart


class DistBelief(Worker):
    """Pushes the sum of the local steps' gradients g; the center moves by -gamma * g / sqrt(sum of all pushed g*g).

    A worker steps with its own optimiser in between: parameters -= lr * g. Every `n_push` steps it pushes, every
    `n_fetch` steps its parameters become the center. The sums of squares lie with the center; adding to one and
    reading what it was is one step for each element, so that every push is counted in some order of them. As in the
    paper there is no epsilon: the first gradient of an element moves it by exactly gamma; one that is 0 moves nothing.
    Push and fetch are done in the step in which they fall due, the push first; with `overlap` by a thread, as in the
    paper, while local steps go on. A push is as stale as the oldest gradient in it. Source: J. Dean et al., *Large
    Scale Distributed Deep Networks*, NIPS 2012, section 4.1 and appendix.

    Args:
        optimizer: a torch.optim.SGD, holding parameters of `model` only; takes the local steps.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
            The center starts from them.
        communication_window: local steps per push and per fetch, 1 or more; 1 by default, as in the paper's
            experiments.
        n_push: local steps per push, 1 or more; None, the default: `communication_window`.
        n_fetch: local steps per fetch, 1 or more; None, the default: `communication_window`.
        gamma: Adagrad's rate, above 0; 0.01 by default, as in torch; the paper names none.
        warm_start: steps that rank 0 takes alone before the other workers begin; 0 by default.
        overlap: local steps during which a thread pushes and fetches, at most `n_fetch`; 0, the default: the worker
            waits. After these steps the parameters become what was fetched: the moves of these steps are given up, but
            not their gradients. A push that falls due waits for the one before; in a warm start the worker waits. Needs
            an MPI with threads (THREAD_MULTIPLE).
        max_clock_spread: exchanges that a worker may be ahead of the slowest one (SSP); None, the default: any number.
        comm: the ranks that train together; default `mpidl.world()`. The center lies on its servers, if it has any.
        buffers: "mean", the default, averages BatchNorm statistics and other floating buffers in `finish()`; "local"
            leaves them.

    Raises:
        ArgumentError: another optimiser; `overlap` together with `max_clock_spread`; optimiser and model do not belong
            together, or an argument cannot work; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or they lie
            on several devices.
        MismatchError: the ranks gave different models or arguments.
    """

    _needs: ClassVar[Requirements] = Requirements(sums=True)
    _sgd_without: ClassVar[tuple[str, ...] | None] = ("maximize",)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Model,
        *,
        communication_window: PositiveInt = 1,
        n_push: PositiveInt | None = None,
        n_fetch: PositiveInt | None = None,
        gamma: PositiveFloat = 0.01,
        warm_start: NonNegativeInt = 0,
        overlap: NonNegativeInt = 0,
        max_clock_spread: NonNegativeInt | None = None,
        comm: Communicator | None = None,
        buffers: str = "mean",
    ) -> None:
        n_push, n_fetch = (communication_window if n is None else n for n in (n_push, n_fetch))
        self._n_push, self._n_fetch, self._gamma = n_push, n_fetch, gamma
        super().__init__(optimizer, model, **given(locals()))
        self._accrued = np.zeros_like(self._start)
        self._since_fetch = 0  # local steps
        self._noted = self._inner.register_step_post_hook(_NoteStep(self._writes))
        hooks: Any = self._inner._optimizer_step_post_hooks
        hooks.move_to_end(self._noted.id, last=False)  # before the user's, which may write
        clock, look, first = self._center.clock, self._center.look, self._ranks.rank == 0
        self._warm = WarmStart(warm_start, self._model, clock, look, self._begin_warm, leads=first)

    def _describe(self) -> dict[str, Any]:
        overlapping.check(self._hyperparameters["overlap"], "n_fetch", self._n_fetch, self._spread)
        return super()._describe()

    def _local_step(self) -> None:
        self._warm.join()  # a model whose forward was not called did not wait there
        self._accrued += self._gradients()
        self._step_inner()
        if self._writes.check():
            raise ArgumentError(
                f"parameter {self._writes.written()[0]} was written in a step hook, and the center of mpidl.DistBelief "
                "would not learn of it, which gets gradients: take a class that commits moves, such as mpidl.Downpour"
            )
        self._since_fetch += 1

    def _exchange_if_due(self) -> None:
        if self._overlap.due(self._since_fetch):
            self._settle()
        push, fetch = self._steps >= self._n_push, self._since_fetch >= self._n_fetch
        if push or fetch:
            others_wait = self._warm.leading  # for this worker, which thus may not wait for them
            overlapped = self._overlap.steps > 0 and not others_wait
            self._exchange(commits=push, pulls=fetch, overlapped=overlapped, bounded=not others_wait)
        self._warm.step()

    def _exchange(self, *, pulls: bool = True, **how: bool) -> Exchange[Any]:
        exchange = super()._exchange(pulls=pulls, **how)
        if pulls:
            self._since_fetch = 0
        return exchange

    def _contribution(self, *, overlapped: bool) -> Flat:
        """Returns the sum of the gradients since the last push."""
        gradient, self._accrued = self._accrued, np.zeros_like(self._accrued)
        return gradient

    def _commit(self, exchange: Exchange[Flat]) -> None:
        gradient = exchange.contribution
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is refused
            squares = gradient * gradient
        if not np.isfinite(squares).all():
            exchange.refuse()
            return
        exchange.begin()
        sums = exchange.add_to_sums(squares)
        sums += squares
        np.sqrt(sums, out=sums)
        # A quotient of 1 first, so that the first move is gamma to the last bit; where no gradient ever was, no move.
        delta = np.divide(gradient, sums, out=np.zeros_like(gradient), where=sums > 0)
        delta *= -self._gamma
        exchange.commit(delta)

    def _start_anew(self, values: Flat) -> None:
        self._accrued[:] = 0
        self._since_fetch = 0
        super()._start_anew(values)

    def _begin_warm(self) -> None:
        """Begins from the center after the warm start of another worker."""
        self._refuse_written()
        self._pull()

    def _pull(self) -> tuple[int, Flat]:
        self._since_fetch = 0
        return super()._pull()

    def _gradients(self) -> Flat:
        """Returns this step's gradients, flat, weight decay included; 0 for a parameter that was not used."""
        decays = sgd.of_each(self._inner, self._held, "weight_decay")
        found = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self._held]
        found = [
            g.detach() if not decay else g.detach().add(p.detach(), alpha=decay)
            for g, decay, (_, p) in zip(found, decays, self._held, strict=True)
        ]
        ordered = [g.permute(order).contiguous() for g, order in zip(found, self._orders, strict=True)]
        return flat.pack(self._layout, ordered)

    def restore(self, clock: int, center: Flat | None = None, sums: Flat | None = None) -> None:
        """As `Worker`; a warm start of the earlier part is not repeated."""
        super().restore(clock, center, sums)
        if clock:
            self._warm.end()

    def _own(self) -> dict[str, Any]:
        if not self._since_fetch:
            return {}
        landed = self._overlap.landed  # becomes the parameters, whatever local steps make of these until then
        parameters = self._flat() if landed is None or landed.center is None else landed.center.copy()
        return {"parameters": parameters, "since_fetch": np.array([self._since_fetch])}

    def restore_own_state(self, saved: Mapping[str, Flat]) -> None:
        if "parameters" in saved:
            self._start_from(self._like(saved["parameters"]))
            self._since_fetch = int(saved["since_fetch"][0])

    def _close(self) -> None:
        self._warm.end()
        super()._close()
        self._noted.remove()


class _NoteStep:
    """The inner optimiser's step hook: parameters are now what the step has made of them."""

    def __init__(self, writes: WriteCheck) -> None:
        self._writes = writes

    def __call__(self, *_: Any) -> None:
        self._writes.note()
