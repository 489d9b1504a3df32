"""The numbers of samples that `samples(k)` gives, on the classes whose gradients stay on their rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mpidl.errors import ArgumentError


def refuse(count: object) -> None:
    """Refuses what is no number of samples.

    Raises:
        ArgumentError: `count` is not a whole number, 0 or more.
    """
    if not isinstance(count, int) or count < 0:
        raise ArgumentError(f"samples({count!r}): expected a whole number of samples, 0 or more")


class SampleCounts:
    """What `samples` said about the gradients of each step.

    Args:
        parameters: those of the gradients.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._inside: int | None = None  # of the block that has not ended
        self._before: int | None = None  # of the blocks that have ended since the last step
        self._steps = 0

    @contextmanager
    def block(self, count: int) -> Iterator[None]:
        """Counts the samples of the gradients that backward makes inside; with 0 samples these become zeros."""
        refuse(count)
        outside, self._inside = self._inside, count
        begun = self._steps
        try:
            if count:
                yield
            else:
                with dropped_gradients(self._parameters):
                    yield
        finally:
            self._inside = outside
            if self._steps == begun:  # a step inside the block has counted the samples already
                self._before = (self._before or 0) + count

    def forget(self) -> None:
        """Forgets the blocks that have ended since the last step: their gradients are made anew."""
        self._before = None

    def of_step(self) -> int | None:
        """Returns the number of samples of the step that is being taken; None if `samples` was not used."""
        known = [count for count in (self._before, self._inside) if count is not None]
        self._before = None
        self._steps += 1
        return sum(known) if known else None


@contextmanager
def dropped_gradients(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Makes the gradients that backward makes inside count for nothing, even if they hold a NaN."""
    new: dict[int, torch.nn.Parameter] = {}

    def drop(parameter: torch.nn.Parameter) -> Any:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            if parameter.grad is None:
                new[id(parameter)] = parameter
            return torch.zeros_like(gradient)

        return parameter.register_hook(hook)  # type: ignore[no-untyped-call]

    handles = [drop(parameter) for parameter in parameters if parameter.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in new.values():
            parameter.grad = None  # as if backward had not reached it
