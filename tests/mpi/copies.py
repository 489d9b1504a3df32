"""Copies of a communicator that is made under other settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import mpidl


@contextmanager
def copied(
    comm: mpidl.Communicator, monkeypatch: pytest.MonkeyPatch, variable: str, value: object
) -> Iterator[mpidl.Communicator]:
    """A copy that was made with `variable` of the environment set to `value`."""
    monkeypatch.setenv(variable, str(value))
    copy = mpidl.Communicator(comm.topology.data)
    yield copy
    copy.barrier()
    copy.free()
