"""Base class of distributed optimisers: a `torch.optim.Optimizer` over the optimiser that the user made.

Synchronous and asynchronous training share this class: checks before the first message, the first broadcast, the inner
optimiser's state, and closing. The exchange of a step is in `synchronous` and `parameter_server`.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta, abstractmethod
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet, ref

import torch

from mpidl.arrays import view as arrays
from mpidl.collectives import communicator
from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError, ClosedError, DtypeError, MismatchError, SharedMemoryError
from mpidl.mpi import exit_protocol, runtime
from mpidl.optim import closures, models, state
from mpidl.optim.agreed_state import AgreedState
from mpidl.optim.buffers import ModelState, refuse_local_norms
from mpidl.optim.modes import Mode

Self = TypeVar("Self", bound="DistributedOptimizer")
_BUFFERS = ("mean", "local")
_ALIKE = (ArgumentError, DtypeError, MismatchError, SharedMemoryError)  # what constructors raise on every rank
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


class _Constructing(ABCMeta):
    """Makes a constructor that fails leave nothing open, in whichever subclass it fails."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made: Any = cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]
        try:
            made.__init__(*args, **kwargs)
        except _ALIKE:
            made._undo()
            raise
        return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """The constructor's, for `inspect.signature` and help()."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:])


class DistributedOptimizer(AgreedState, torch.optim.Optimizer, metaclass=_Constructing):
    """Base of `Synchronous` and of the parameter server's optimisers.

    `param_groups`, `state`, `defaults` and the step hooks are the inner optimiser's own objects, so that schedulers,
    GradScaler and hooks see and change what the inner optimiser uses.

    Args:
        optimizer: the optimiser to wrap; it must hold parameters of `model` only.
        model: a module, or a list of modules and parameters; its parameters and buffers are broadcast from rank 0, in
            place.
        comm: communicator of the ranks that train together, which is duplicated; default `mpidl.world()`.
        buffers: "mean": at `finish()` the ranks agree on buffers, and on parameters that are not trained: floating ones
            become the mean over ranks, see `mpidl.optim.buffers`; "local": they stay as they are.

    The constructor is a collective.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: models.Model,
        *,
        comm: Communicator | None,
        buffers: str,
        error: Exception | None = None,
    ) -> None:
        self._inner = optimizer
        self._model = models.together(model)
        if comm is not None and not isinstance(comm, Communicator):
            raise DtypeError(
                f"comm is a {type(comm).__name__}; expected an mpidl.Communicator, such as mpidl.Communicator(comm)"
            )
        self.comm = comm if comm is not None else communicator.world()
        self._buffers = buffers
        self._finished = False
        self._token = 0  # of nothing
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
        self._model_state = ModelState(self._model, self._held, adding=self._steps_apart)
        self._opened()
        self._token = exit_protocol.opened(f"mpidl.{name}: its finish() was never called")
        self._steps_inner = False  # whether the inner optimiser's step is this optimiser's
        self._no_step_alone = self._inner.register_step_pre_hook(_NoStepAlone(self))

    def _undo(self) -> None:
        """Closes what this constructor has opened before a subclass's failed, alike on all ranks; a collective."""
        if self.__dict__.get("_token"):
            exit_protocol.closed(self._token)
            self._ranks.free()

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
            wrong = models.problem(self._model)
            if wrong is not None:
                raise wrong
            if self._buffers not in _BUFFERS:
                raise ArgumentError(f"buffers={self._buffers!r}; expected one of {', '.join(_BUFFERS)}")
            refuse_local_norms(self._model)
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
        """Copies rank 0's parameters and buffers to all ranks, but for what another optimiser trains; a collective."""
        state.broadcast_model(self._ranks, self._model, leaving=self._trained_elsewhere(self._ranks))

    def _describe(self) -> dict[str, Any]:
        """Returns the other settings that must be alike on all ranks, as JSON-able items."""
        return {}

    # GradScaler must unscale by itself: the scale that a fused optimiser would use is set here, not on the inner one.
    _step_supports_amp_scaling = False

    # The inner optimiser's own objects, for torch and the user.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        held = [p for group in self._inner.param_groups for p in group["params"]]
        given = [p for group in groups for p in group["params"]]
        if sorted(map(id, held)) != sorted(map(id, given)):
            raise ArgumentError("param_groups: the parameters were fixed by the constructor; regroup the same ones")
        self._inner.param_groups = groups

    @property
    def state(self) -> Any:
        return self._inner.state

    @state.setter
    def state(self, state: Any) -> None:
        if state and self._inner in _sharded:
            raise ArgumentError("state: with shard=True it is that of pieces of parameters; use load_state_dict()")
        self._inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self._inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._inner.defaults = defaults

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
        self._refuse_closed("step")  # a forked child too: its commit would reach the center
        closures.refuse_argument(closure)
        thawed = [name for name, p in self._frozen if p.requires_grad]
        if thawed:
            raise ArgumentError(
                f"step: {len(thawed)} parameter(s) were frozen when this mpidl.{type(self).__name__} was made and now "
                f"require gradients, which would not be exchanged: {', '.join(thawed[:5])}"
                f"{', ...' if len(thawed) > 5 else ''}; call finish() and make a new one after such a change"
            )

    def _step_inner(self, closure: Any = None) -> Any:
        """Takes the inner optimiser's step, which it may not take by itself; returns what it returns."""
        self._steps_inner = True
        try:
            return self._inner.step() if closure is None else self._inner.step(closure)
        finally:
            self._steps_inner = False

    # What the user has written.

    @abstractmethod
    def broadcast_parameters(self) -> None:
        """Makes all ranks start anew from rank 0's parameters and buffers; a collective.

        Call it on every rank after weights were written outside a step: by `load_state_dict`, by a reset, by an average
        that is kept. What the optimiser has gathered, such as momenta and moments, is kept on every rank.

        Raises:
            ArgumentError: a parameter has another shape or dtype than the optimiser was given, or was replaced.
            ClosedError: `finish()` was called.
            MismatchError: shapes or dtypes differ between ranks, or another rank refused.
        """

    def _broadcast_model(self, error: Exception | None = None) -> None:
        """Gives all ranks rank 0's parameters and buffers, in place, if all can take them; a collective.

        Args:
            error: that this rank has found.
        """
        name, model = type(self).__name__, self._model
        state.agree(self._ranks, f"broadcast_parameters of mpidl.{name}", state.describe_model(model), error)
        state.broadcast_model(self._ranks, model, leaving=self._trained_elsewhere(self._ranks))
        arrays.mark_tensors_written(model.parameters())

    def _refuse_closed(self, what: str) -> None:
        runtime.mpi()  # refuses a forked child, which shares the node's memory
        if self._finished:
            raise ClosedError(f"{what}: finish() was called on this mpidl.{type(self).__name__}")

    # What every class has, with the meaning that fits it.

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Makes backward inside accumulate this rank's gradients only."""

    @abstractmethod
    def samples(self, count: int) -> AbstractContextManager[None]:
        """Says that backward inside is on so many samples of this rank; 0: the gradients inside do not count."""

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clips the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_` does.

        Args:
            max_norm: largest 2-norm after clipping.

        Returns:
            The norm before clipping, of one element.
        """
        return torch.nn.utils.clip_grad_norm_([p for _, p in self._held], max_norm)

    # Closing.

    def finish(self) -> None:
        """Ends training on this rank; a collective, harmless the second time."""
        if self._finished:
            return
        runtime.refuse_forked()
        mode = Mode(self._inner, self._held)
        self._begin_mode(mode)
        self._close()
        error = self._agree_on_state(mode)
        self._ranks.barrier("finish")
        self._ranks.free()
        self._finished = True
        self._no_step_alone.remove()
        self._closed()
        exit_protocol.closed(self._token)
        if error is not None:
            raise error

    def _begin_mode(self, mode: Mode) -> None:
        """Puts an optimiser of two modes into train mode, which writes parameters."""
        mode.begin()

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


class _NoStepAlone:
    """The inner optimiser's step hook: refuses a step that no distributed optimiser has begun."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = ref(optimizer)

    def __call__(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and not optimizer._steps_inner:
            raise ArgumentError(
                f"step: this {type(inner).__name__} was given to mpidl.{type(optimizer).__name__} and may not step by "
                "itself, since no other rank would learn of it: call step() of the mpidl optimizer"
            )
