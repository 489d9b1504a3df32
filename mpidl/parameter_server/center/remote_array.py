"""The flat array of a center of which every node holds a part, in memory that the node's ranks share.

Ranks change their own node's part in place, and other nodes' parts by active messages. The two other arrays that can
hold a center are in `rma_array` and `node_array`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpidl.errors import ClosedError, RankFailedError
from mpidl.mpi import exit_protocol
from mpidl.one_sided.active_message import ADD, AFTER, BEFORE, HEADER, NOTHING, READ, REPLACE, ActiveMessage, wait
from mpidl.one_sided.locked_array import LockedArray
from mpidl.one_sided.message_server import MessageServer
from mpidl.optim.flat import Few, Flat
from mpidl.parameter_server.center.sharding import Shard, runs

_MOST_RUNS = 32  # in one shard: beyond, all of it is sent


class RemoteArray:
    """Its operations are those of the others; all has taken effect when a call returns.

    Args:
        blocks: this node's part, a locked array.
        places: of each shard's owner, where in its node's part the shard begins; its node holds it.
        order: the shards, in the order in which this rank goes through them.
        here: the owners on this rank's node.
        look: called while this rank waits for answers; raises if a rank has died.
    """

    def __init__(
        self,
        blocks: LockedArray,
        *,
        places: dict[int, int],
        order: Sequence[Shard],
        here: frozenset[int],
        look: Callable[[], None],
    ) -> None:
        self.blocks, self._places, self._look = blocks, places, look
        self._parts = [part for part in order if part.count]
        self._here = here
        self.dtype = str(blocks.dtype)
        self._messages: MessageServer
        self._number = 0

    def join(self, server: MessageServer, number: int) -> None:
        """Sets the server of active messages, which this rank drives while it waits for answers; before the first use.

        Args:
            server: answers messages about `blocks`; its communicator carries this rank's messages too.
            number: of this array there.
        """
        self._messages, self._number = server, number

    def add(self, values: Flat) -> None:
        self._each(ADD, values=values)

    def add_and_pull(self, values: Flat, scale: float, out: Flat) -> None:
        """Adds `values * scale`, and copies the array, as it is then, into `out`."""
        self._each(ADD, values=values, scale=scale, answer=AFTER, out=out)

    def add_and_read(self, values: Flat) -> Flat:
        before = np.empty_like(values)
        self._each(ADD, values=values, answer=BEFORE, out=before)
        return before

    def add_few(self, few: Few) -> None:
        with self._sending() as messages:
            for part in self._parts:
                first, last = np.searchsorted(few.at, (part.start, part.start + part.count))
                found = list(runs(few.at[first:last]))
                if len(found) > _MOST_RUNS and part.owner not in self._here:
                    found = [(found[0][0], found[-1][1])]
                for start, stop in found:
                    self._one(messages, ADD, part, slice(start, stop), values=few.values)

    def read(self, out: Flat) -> None:
        self._each(READ, answer=AFTER, out=out)

    def write(self, part: Shard, values: Flat) -> None:
        self.replace(part, values)

    def read_shard(self, part: Shard, out: Flat) -> None:
        with self._sending() as messages:
            self._one(messages, READ, part, answer=AFTER, out=out, offset=part.start)

    def replace(self, part: Shard, values: Flat) -> None:
        with self._sending() as messages:
            self._one(messages, REPLACE, part, values=values, offset=part.start)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.blocks.close()

    def _each(self, kind: int, **options: Any) -> None:
        """Does the same with every shard; messages first, which travel while this node's part is changed."""
        parts = sorted(self._parts, key=lambda part: part.owner in self._here)
        with self._sending() as messages:
            for part in parts:
                self._one(messages, kind, part, **options)

    def _one(
        self,
        messages: list[ActiveMessage],
        kind: int,
        part: Shard,
        place: slice | None = None,
        *,
        values: Flat | None = None,
        scale: float = 1.0,
        answer: int = NOTHING,
        out: Flat | None = None,
        offset: int = 0,
    ) -> None:
        """Does one thing with a shard, or a place in it: at once on this node, on another one by a message.

        Args:
            messages: receives the message.
            kind, answer: see `active_message`.
            part: the shard.
            place: in the whole array; None: all of the shard.
            values, out: whole arrays, or only what lies from `offset` on.
        """
        place = slice(part.start, part.start + part.count) if place is None else place
        at, count = self._places[part.owner] + place.start - part.start, place.stop - place.start
        given, found = (
            None if one is None else one[place.start - offset : place.stop - offset] for one in (values, out)
        )
        if not count:
            return
        if part.owner not in self._here:
            header = np.array([(self._number, kind, answer, at, count, scale)], HEADER)
            messages.append(ActiveMessage(self._messages.ranks, part.owner, header, given, found))
            return
        if kind == READ:
            self.blocks.read(at, found)
        elif kind == REPLACE:
            self.blocks.replace(at, given)
        else:
            read = {} if answer == NOTHING else {"before" if answer == BEFORE else "after": found}
            self.blocks.add(at, given, scale, **read)

    @contextmanager
    def _sending(self) -> Iterator[list[ActiveMessage]]:
        """Collects messages and waits for their answers at the end; after an error no further message can be sent."""
        messages, channel = list[ActiveMessage](), self._messages.ranks.channel
        if channel.given_up is not None:
            if failed := exit_protocol.thread_failure():  # of the progress thread: it knows which rank died
                raise RankFailedError(f"the center takes no further calls: {failed}")
            raise ClosedError(f"the center takes no further calls: {channel.given_up}")
        try:
            yield messages
            if messages:
                self._messages.attended = True
                wait(messages, self._messages.serve, self._look)
        except BaseException:
            if messages:
                channel.give_up(f"an exchange ({self._messages.ranks.name})", messages)
            raise
        finally:
            self._messages.attended = False
