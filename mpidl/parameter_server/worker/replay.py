"""Asynchronous training that can be run again: `MPIDL_REPLAY=FILE` makes exchanges happen one after the other.

Where the file is not there, workers exchange in the order in which they come, and `finish()` writes that order into it.
Where it is, a token goes round in the order that it holds: with the same ranks, data and seeds every commit then finds
the center that it found before, and the run ends with the same bits. The second optimiser of a program uses FILE.1, the
next one FILE.2, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpidl.errors import ArgumentError
from mpidl.mpi.topology import Topology
from mpidl.mpi.waiting import Backoff
from mpidl.native import environment
from mpidl.parameter_server.center.clock import Clock

VARIABLE = environment.REPLAY.name
_made = 0  # logs that this process has asked for


@dataclass(frozen=True)
class Log:
    """The order of exchanges of one run."""

    file: Path
    rule: str  # the algorithm
    workers: int
    order: tuple[int, ...] | None  # ranks; None: to be recorded

    @property
    def description(self) -> str:
        """What must be alike on all ranks."""
        content = "to be recorded" if self.order is None else str(hash(self.order))
        return f"{self.file.name}: {content}"


def log_for(rule: str, workers: int, *, waits: bool) -> Log | None:
    """Returns the log that the next optimiser of this process records or follows; None: exchanges come in any order.

    Args:
        rule: the algorithm.
        workers: how many.
        waits: whether its workers wait for each other by a rule of their own (SSP, warm start).

    Raises:
        ArgumentError: the workers wait, perhaps for one that waits for the token; or the file is no log, or the log of
            another algorithm or number of workers.
    """
    global _made
    name = environment.REPLAY.read()
    if not name:
        return None
    if waits:
        raise ArgumentError(
            f"{VARIABLE} is set: it gives the order, and max_clock_spread and warm_start another: leave one"
        )
    number, _made = _made, _made + 1
    file = Path(f"{name}.{number}" if number else name)
    try:
        content = json.loads(file.read_text())
        found, order = (content["algorithm"], content["workers"]), tuple(int(rank) for rank in content["order"])
    except FileNotFoundError:
        return Log(file, rule, workers, None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{VARIABLE}={file} is no log of exchanges ({error}); remove it to record one") from error
    if found != (rule, workers):
        raise ArgumentError(
            f"{VARIABLE}={file} is the log of {found[0]} on {found[1]} worker(s); expected {rule} on {workers}: give "
            "the file of that run, or remove it to record one"
        )
    return Log(file, rule, workers, order)


class Replay:
    """The order of one center's exchanges, as one worker sees it.

    Args:
        log: as `log_for` returned it.
        clock: holds the token, a place in the order.
        ranks: the workers.
        look: called while this worker waits; raises if a rank has died.
    """

    def __init__(self, log: Log, clock: Clock, ranks: Topology, look: Callable[[], None]) -> None:
        self._log, self._clock, self._ranks, self._look = log, clock, ranks, look
        self._recording = log.order is None
        self._places = [place for place, rank in enumerate(log.order or ()) if rank == ranks.rank]
        self._taken: list[int] = []

    @property
    def follows(self) -> bool:
        """Whether the order of a log is followed, and none is recorded."""
        return not self._recording

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """The ordered section: holds the token during one exchange of this worker.

        Raises:
            ArgumentError: the log has no further exchange of this worker.
        """
        ticket = self._next()
        backoff = Backoff()
        while self._clock.token() != ticket:
            backoff.pause()
            self._look()
        yield
        self._taken.append(ticket)
        self._clock.pass_token_on()

    def _next(self) -> int:
        if self._recording:
            return self._clock.take_ticket()
        if len(self._taken) == len(self._places):
            raise self._other("more than")
        return self._places[len(self._taken)]

    def close(self) -> None:
        """Writes the log, if this run was to make one; a collective, after the last exchange.

        Raises:
            ArgumentError: the log has further exchanges of this worker, for which others would wait.
        """
        if not self._recording:
            if len(self._taken) < len(self._places):
                raise self._other(f"{len(self._taken)} and not")
            return
        gathered = self._ranks.gather_bytes(np.array(self._taken, np.int64).tobytes(), "writing the log of exchanges")
        if self._ranks.rank == 0:
            places = [np.frombuffer(each, np.int64) for each in gathered]
            order = np.empty(sum(each.size for each in places), np.int64)
            for rank, each in enumerate(places):
                order[each] = rank
            self._write(order)

    def _other(self, how_often: str) -> ArgumentError:
        found = f"rank {self._ranks.rank} exchanges {how_often} the {len(self._places)} time(s) of the run"
        return ArgumentError(
            f"{VARIABLE}={self._log.file}: {found} that the log is of; give the same job, data and settings"
        )

    def _write(self, order: np.ndarray[Any, Any]) -> None:
        log = self._log
        content = {"algorithm": log.rule, "workers": log.workers, "order": order.tolist()}
        part = log.file.with_name(log.file.name + ".part")
        part.write_text(json.dumps(content))
        part.replace(log.file)
