"""Which gradients a round has reduced, and which ones no round has seen: those that the user has made.

A gradient may come from `torch.autograd.grad`, from another model, or from no model at all. `step()` reduces such
gradients. It must not reduce a gradient once more that the user has clipped, masked or unscaled after its reduction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class ReductionRecord:
    """What rounds have done since the last optimiser step.

    A parameter that a round has reduced since the last step is the user's: whatever p.grad becomes then, it stays so.
    Of the other parameters a gradient is new unless it is the very tensor, unwritten, that was there at the end of the
    last step. Where a round has reduced is equal on all ranks.

    Args:
        parameters: all whose gradients are reduced.

    Attributes:
        rounds: rounds since the last step.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._everything = frozenset(range(len(parameters)))
        self._reduced: set[int] = set()
        self._left: list[torch.Tensor | None] = [None] * len(parameters)
        self._versions = [0] * len(parameters)  # of those
        self._any_left = False
        self.rounds = 0

    def note_round(self, used: Sequence[bool]) -> None:
        """Notes which parameters a round has reduced."""
        self.rounds += 1
        if all(used):
            self._reduced.update(self._everything)
        else:
            self._reduced.update(index for index, one in enumerate(used) if one)

    def note_step(self) -> None:
        """Notes the gradients that are left at the end of an optimiser step."""
        self.rounds = 0
        self.forget()

    def forget(self) -> None:
        """Takes the gradients that are there for old ones; `zero_grad` has emptied them."""
        self._reduced.clear()
        self._left = [p.grad for p in self._parameters]
        self._versions = [0 if g is None else g._version for g in self._left]
        self._any_left = True

    def release(self) -> None:
        """Lets go of gradients that are no longer those of their parameters, so that their memory can be used again."""
        if self._any_left:
            pairs = zip(self._parameters, self._left, strict=True)
            self._left = [None if g is None or p.grad is not g else g for p, g in pairs]
            self._any_left = any(g is not None for g in self._left)

    def unreduced(self) -> set[int]:
        """Returns the parameters, by index, with a gradient that no round has seen."""
        if len(self._reduced) == len(self._parameters):
            return set()
        return {index for index in self._everything - self._reduced if self._new(index)}

    def _new(self, index: int) -> bool:
        gradient, left = self._parameters[index].grad, self._left[index]
        if gradient is None:
            return False
        return left is not gradient or self._versions[index] != gradient._version
