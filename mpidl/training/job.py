"""Loads a job file and holds its functions; what they return is checked here, before the first training step.

A job is a Python file that does nothing at import and has

    model() -> torch.nn.Module
    loss(model, batch) -> Tensor            the mean over the batch, one floating-point number
    data(train: bool) -> Dataset            with a length; batches are made by torch's default collation

and optionally

    optimizer(parameters) -> Optimizer      else SGD with lr 0.05 and momentum 0.9
    scheduler(optimizer) -> LRScheduler     its step() is called after each epoch, without arguments
    accuracy(model, batch) -> Tensor|float  the mean over the batch
    add_options(parser)                     an argparse parser; what it parses from the arguments after `--` is set as
                                            the module's attribute `options` before any other function is called
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset

from mpidl.errors import ArgumentError

_REQUIRED = {"model": 0, "loss": 2, "data": 1}  # function -> how many positional arguments it is called with
_OPTIONAL = {"optimizer": 1, "scheduler": 1, "accuracy": 2, "add_options": 1}


@dataclass(frozen=True)
class Job:
    """The functions of a job file, its options parsed."""

    file: Path
    model: Callable[[], torch.nn.Module]
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    data: Callable[[bool], Dataset[Any]]
    accuracy: Callable[[torch.nn.Module, Any], torch.Tensor | float] | None
    optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None
    options: dict[str, Any]  # as parsed, for the summary

    def new_model(self) -> torch.nn.Module:
        """Returns a model of the job.

        Raises:
            ArgumentError: `model` returned something else.
        """
        model = self.model()
        if not isinstance(model, torch.nn.Module):
            raise ArgumentError(f"model() of {self.file} must return a torch.nn.Module, found {_kind(model)}")
        return model

    def dataset(self, train: bool) -> Dataset[Any]:
        """Returns the training or the held-out data.

        Raises:
            ArgumentError: `data` returned something without a length or without an element.
        """
        dataset = self.data(train)
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ArgumentError(
                f"data(train={train}) of {self.file} must return a Dataset with a length, found {_kind(dataset)}"
            )
        if len(dataset) == 0:
            raise ArgumentError(f"data(train={train}) of {self.file} returned no samples")
        return dataset

    def new_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Returns the job's optimiser over `parameters`.

        Raises:
            ArgumentError: `optimizer` returned something else.
        """
        optimizer = self.optimizer(parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer(parameters) of {self.file} must return a torch.optim.Optimizer, found {_kind(optimizer)}"
            )
        return optimizer

    def new_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        """Returns the job's scheduler over `optimizer`, or None.

        Raises:
            ArgumentError: `scheduler` returned something that cannot be stepped once per epoch.
        """
        if self.scheduler is None:
            return None
        scheduler = self.scheduler(optimizer)
        if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
            raise ArgumentError(
                f"scheduler(optimizer) of {self.file} must return a torch.optim.lr_scheduler.LRScheduler whose step() "
                f"takes no argument, found {_kind(scheduler)}"
            )
        return scheduler

    def try_batches(self, model: torch.nn.Module, train_batch: Any, held_out_batch: Any) -> None:
        """Calls `loss` and `accuracy` once, leaving the model's buffers and torch's random state as they were.

        Raises:
            ArgumentError: one of them returned something that is not one number, or a loss without a gradient.
        """
        kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
        with torch.random.fork_rng(devices=[]):
            loss = self.loss(model, train_batch)
            accuracy = self.accuracy(model, held_out_batch) if self.accuracy is not None else 0.0
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        self._check_loss(loss)
        if torch.as_tensor(accuracy).dim() != 0:
            raise ArgumentError(
                f"accuracy(model, batch) of {self.file} must return one number, found {_kind(accuracy)}"
            )

    def _check_loss(self, loss: object) -> None:
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            raise ArgumentError(
                f"loss(model, batch) of {self.file} must return a scalar floating-point tensor, the mean over the "
                f"batch; found {_kind(loss)}"
            )
        if not loss.requires_grad:
            raise ArgumentError(f"loss(model, batch) of {self.file} returned a tensor that depends on no parameter")


def load(file: Path, arguments: Sequence[str] = ()) -> Job:
    """Imports a job file, with its folder first on sys.path as `python FILE` has it, and parses its options.

    Raises:
        ArgumentError: no such file, a function is missing or cannot be called as it will be, or a wrong option.
    """
    module = _import(file)
    for name, count in (_REQUIRED | _OPTIONAL).items():
        _check_function(module, file, name, count)
    options = _parse(module, file, arguments)
    module.options = options  # type: ignore[attr-defined]
    functions = {name: getattr(module, name) for name in _REQUIRED}
    return Job(
        file=file,
        **functions,
        accuracy=getattr(module, "accuracy", None),
        optimizer=getattr(module, "optimizer", _default_optimizer),
        scheduler=getattr(module, "scheduler", None),
        options=vars(options),
    )


def _default_optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _import(file: Path) -> ModuleType:
    if not file.is_file():
        raise ArgumentError(f"no job file {file}")
    spec = importlib.util.spec_from_file_location(f"mpidl_job_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"the job {file} is not a Python file: its name must end in .py")
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up there
    spec.loader.exec_module(module)
    return module


def _check_function(module: ModuleType, file: Path, name: str, count: int) -> None:
    function = getattr(module, name, None)
    if function is None and name in _OPTIONAL:
        return
    if function is None:
        raise ArgumentError(f"the job {file} has no function {name}(): a job needs model(), loss() and data()")
    if not callable(function):
        raise ArgumentError(f"{name} of {file} must be a function, found {_kind(function)}")
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError as error:
        raise ArgumentError(f"{name}() of {file} must take {count} positional arguments: {error}") from error
    except ValueError:  # a builtin or a class without a signature: it shows when it is called
        return


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing and ending the process: every rank must refuse alike, and one should print."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{self.prog}: {message}; the job's options are listed by `-- --help`")


class HelpAskedError(SystemExit):
    """The user asked for the job's own options; ends the program with status 0. The text is for one rank to print."""

    def __init__(self, text: str) -> None:
        super().__init__(0)
        self.text = text


class _HelpAction(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise HelpAskedError(parser.format_help())


def _parse(module: ModuleType, file: Path, arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog=f"options of {file.name}", usage="... -- [options]", add_help=False)
    parser.add_argument("-h", "--help", nargs=0, action=_HelpAction, help="show these options")
    if hasattr(module, "add_options"):
        module.add_options(parser)
    options = parser.parse_args(list(arguments))
    del options.help
    return options


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{type(value).__name__}"
