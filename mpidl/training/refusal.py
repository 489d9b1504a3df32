"""How the ranks refuse alike: what fails on one rank ends the run on all, with one message, before training.

Collectives; used only between phases, never in an asynchronous loop.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import mpidl
from mpidl.collectives.communicator import Communicator
from mpidl.errors import ArgumentError, MismatchError, MpidlError
from mpidl.training import algorithms
from mpidl.training.settings import Settings

T = TypeVar("T")


class RefusedError(ArgumentError):
    """The run was refused before training, on every rank with the same message."""


def workers(settings: Settings) -> Communicator:
    """Returns the ranks that train; on the others, which serve, the program ends here when they have ended.

    Raises:
        RefusedError: there cannot be so many servers, or the algorithm has no use for an option.
    """
    try:
        algorithms.check(settings)
        return mpidl.world(servers=settings.servers)
    except (ArgumentError, MismatchError) as error:  # raised alike on every rank
        raise RefusedError(str(error)) from error


def everywhere(comm: Communicator, phase: Callable[[], T]) -> T:
    """Returns phase() if it returned on every rank.

    Args:
        comm: all its ranks make this call.
        phase: makes no collective, so that no rank waits in it for one that has failed.

    Raises:
        RefusedError: it raised somewhere; the same message on every rank, that of the lowest rank that failed.
    """
    try:
        result, complaint = phase(), ""
    except (MpidlError, ImportError) as refusal:  # the sentence says it all
        complaint = str(refusal)
    except Exception as error:  # from the user's own functions: the traceback helps, once
        complaint = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    gathered = comm.topology.gather_bytes(complaint.encode(), "agreeing to go on")
    complaints = [text.decode() for text in gathered]
    for rank, text in enumerate(complaints):
        if text:
            alike = sum(other == text for other in complaints) == comm.size
            raise RefusedError(text if alike else f"rank {rank}: {text}")
    return result
