"""Base class of distributed optimisers: a `torch.optim.Optimizer` over the optimiser that the user made.

Synchronous and asynchronous training share this class: checks before the first message, the first broadcast, the inner
optimiser's state, and closing. The exchange of a step is in `synchronous` and `parameter_server`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from mpidl.collectives import communicator
from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError, ClosedError, DtypeError
from mpidl.mpi import exit_protocol, runtime
from mpidl.optim import state

Self = TypeVar("Self", bound="DistributedOptimizer")
_BUFFERS = ("mean", "local")
_sharded: WeakSet[torch.optim.Optimizer] = WeakSet()


def mark_sharded(optimizer: torch.optim.Optimizer) -> None:
    """Notes that an optimiser's state is in pieces from now on."""
    _sharded.add(optimizer)


def refuse_sharded(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimiser whose state is in pieces.

    Raises:
        ArgumentError: the optimiser's state is in pieces.
    """
    if optimizer in _sharded:
        raise ArgumentError(
            f"this {type(optimizer).__name__} was given to mpidl.Synchronous(shard=True), and holds pieces of its "
            "state: make a new one, and load the full_state_dict() of before finish()"
        )


class DistributedOptimizer(torch.optim.Optimizer, ABC):
    """Base of `Synchronous` and of the parameter server's optimisers.

    `param_groups`, `state`, `defaults` and the step hooks are the inner optimiser's own objects, so that schedulers,
    GradScaler and hooks see and change what the inner optimiser uses.

    Args:
        optimizer: the optimiser to wrap; it must hold parameters of `model` only.
        model: its parameters and buffers are broadcast from rank 0, in place.
        comm: communicator of the ranks that train together, which is duplicated; default `mpidl.world()`.
        buffers: "mean": at `finish()` floating buffers (BatchNorm statistics) become the mean over ranks and others
            those of rank 0; "local": they stay as they are.

    The constructor is a collective.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        comm: Communicator | None,
        buffers: str,
        error: Exception | None = None,
    ) -> None:
        self._inner = optimizer
        self._model = model
        if comm is not None and not isinstance(comm, Communicator):
            raise DtypeError(
                f"comm is a {type(comm).__name__}; expected an mpidl.Communicator, such as mpidl.Communicator(comm)"
            )
        self.comm = comm if comm is not None else communicator.world()
        self._buffers = buffers
        self._finished = False
        name = type(self).__name__
        self._ranks = self.comm.topology.duplicate(f"{name}'s copy of {self.comm.topology.name}")
        self._held: state.Named = []
        self._frozen: state.Named = []
        try:
            self._check(error)
            self._broadcast()
        except Exception:
            self._ranks.free()
            raise
        self._token = exit_protocol.opened(f"mpidl.{name}: its finish() was never called")

    def _check(self, error: Exception | None) -> None:
        """Refuses bad input alike on every rank, before any other message."""
        name, description, unheld = type(self).__name__, dict[str, Any](), list[str]()
        try:
            if error is not None:
                raise error
            if not isinstance(self._inner, torch.optim.Optimizer):
                raise ArgumentError(f"optimizer is a {type(self._inner).__name__}; expected a torch.optim.Optimizer")
            if isinstance(self._inner, DistributedOptimizer):
                raise ArgumentError(f"optimizer is already a mpidl.{type(self._inner).__name__}; wrap it once")
            refuse_sharded(self._inner)
            if not isinstance(self._model, torch.nn.Module):
                raise ArgumentError(f"model is a {type(self._model).__name__}; expected a torch.nn.Module")
            if self._buffers not in _BUFFERS:
                raise ArgumentError(f"buffers={self._buffers!r}; expected one of {', '.join(_BUFFERS)}")
            held = state.held_parameters(self._inner, self._model)
            self._held, self._frozen, unheld = held.trained, held.frozen, [name for name, _ in held.others]
            description = state.describe(self._model, held) | self._describe()
        except Exception as found:  # of any kind: the other ranks wait for this rank's description
            error = found
        state.agree(self._ranks, f"mpidl.{name}", description, error)
        if unheld and self._ranks.rank == 0:
            exit_protocol.say(
                f"{name}: {len(unheld)} parameter(s) of the model are broadcast once but not trained, since the "
                f"optimizer does not hold them: {', '.join(unheld[:5])}{', ...' if len(unheld) > 5 else ''}"
            )

    def _broadcast(self) -> None:
        """Copies rank 0's parameters and buffers to all ranks; a collective."""
        state.broadcast_model(self._ranks, self._model)

    def _describe(self) -> dict[str, Any]:
        """Returns the other settings that must be alike on all ranks, as JSON-able items."""
        return {}

    # GradScaler must unscale by itself: the scale that a fused optimiser would use is set here, not on the inner one.
    _step_supports_amp_scaling = False

    # The inner optimiser's own objects, for torch and the user.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self._inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._inner.defaults

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Calls `zero_grad` of the inner optimiser.

        Args:
            set_to_none: whether gradients become None; False: zeros.
        """
        self._inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the inner optimiser's `state_dict()`."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict()` into the inner optimiser; load the same state on every rank."""
        self._inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the constructor has fixed the parameters, alike on all ranks.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("add_param_group: the parameters were fixed by the constructor; add the group before it")

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Registers a step hook with the inner optimiser, and returns its handle."""
        return self._inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Registers a step hook with the inner optimiser, and returns its handle."""
        return self._inner.register_step_post_hook(hook)

    def __repr__(self) -> str:
        return f"mpidl.{type(self).__name__} over {self._inner!r}"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"mpidl.{type(self).__name__} cannot be pickled or copied; save its state_dict()")

    def _refuse(self, closure: Any) -> None:
        """Refuses a step that cannot be taken."""
        runtime.mpi()  # refuses a forked child, which shares the node's memory: its commit would reach the center
        if self._finished:
            raise ClosedError(f"step: finish() was called on this mpidl.{type(self).__name__}")
        if closure is not None:
            raise ArgumentError("step: a closure would run backward a different number of times on each rank")
        thawed = [name for name, p in self._frozen if p.requires_grad]
        if thawed:
            raise ArgumentError(
                f"step: {len(thawed)} parameter(s) were frozen when this mpidl.{type(self).__name__} was made and now "
                f"require gradients, which would not be exchanged: {', '.join(thawed[:5])}"
                f"{', ...' if len(thawed) > 5 else ''}; call finish() and make a new one after such a change"
            )

    # Closing.

    def finish(self) -> None:
        """Ends training on this rank; a collective, harmless the second time."""
        if self._finished:
            return
        self._close()
        if self._buffers == "mean":
            state.average_buffers(self._ranks, self._model)
        self._ranks.barrier("finish")
        self._ranks.free()
        self._finished = True
        exit_protocol.closed(self._token)

    @abstractmethod
    def _close(self) -> None:
        """Ends the exchange of gradients or deltas; a collective."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Calls `finish()` after a normal end only: after an exception this rank must not wait for other ranks."""
        if kind is None:
            self.finish()
