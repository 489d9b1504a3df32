"""The checks that a rank makes before every step: that of the parameters' signature, and one of sharded weights."""

from __future__ import annotations

from typing import Any

from mpidl.optim.signature import Signature
from mpidl.synchronous.reduction.header import StepCheck


class BothChecks:
    """Two checks as one; the numbers of their errors do not overlap.

    Args:
        signature: of the parameters.
        other: made first; None: no other check.
    """

    def __init__(self, signature: Signature, other: StepCheck | None) -> None:
        self._signature, self._other = signature, other

    def check(self, *, finishing: bool) -> int:
        """Returns 0, or the number of the error that this rank has found."""
        error = 0 if self._other is None else self._other.check(finishing=finishing)
        return self.others(error) or 2 * self._signature.check(finishing=finishing)

    def gradient_error(self, index: int) -> int:
        """Returns the number of the error that a parameter's gradient cannot be reduced."""
        return 2 * self._signature.gradient_error(index)

    @staticmethod
    def others(error: int) -> int:
        """Returns the number here of an error of the other check, or 0."""
        return error and 2 * error + 1

    def describe_error(self, number: int) -> Exception:
        """Returns the error of this number, found by any rank."""
        if number % 2 and self._other is not None:
            return self._other.describe_error(number // 2)
        return self._signature.describe_error(number // 2)

    def describe(self) -> dict[str, Any]:
        """Returns what must be alike on all ranks, as JSON-able items."""
        return self._signature.describe()
