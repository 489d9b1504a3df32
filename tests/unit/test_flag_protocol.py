"""The protocol of docs/flag_protocol.md, in every order in which three ranks can go through their phases.

A model, not the code: one move of a rank is the beginning or the end of reading or writing a piece, and any rank may be
next. Every state that can be reached is looked at. A reader must find what it came for when it begins and when it ends;
and somebody must always be able to go on. That the rules are tight is shown by planting faults in them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

RANKS, SLOTS = 3, 2
WRITING = -1

# A call: how it goes on after the agreement, and its rounds.
ALLREDUCE, BROADCAST, SMALL, DIFFERS = "allreduce", "broadcast", "small", "differs"
SCRIPTS = {
    "an allreduce of three rounds": ((ALLREDUCE, 3),),
    "an allreduce, then a broadcast, which leaves out stages": ((ALLREDUCE, 1), (BROADCAST, 2)),
    "small calls, one of which differs": ((SMALL, 0), (DIFFERS, 0), (SMALL, 0), (SMALL, 0)),
}


@dataclass(frozen=True)
class Rules:
    """The rules, or what a fault makes of them."""

    stage_waits: int = SLOTS  # rounds that staging may be ahead of what the others have produced
    produce_waits: int = SLOTS  # rounds that producing may be ahead of what the others have consumed
    announcements: int = 2
    leaves_early: bool = False  # a call that differs ends at the first announcement that is not like its own


@dataclass(frozen=True)
class Rank:
    call: int = 0
    announced: bool = False
    agreed: int = 0  # announcements seen
    base: int = 0
    staged: int = 0
    produced: int = 0
    consumed: int = 0
    taken: int = 0
    doing: tuple[str, int] | None = None  # what has begun and not ended, and with whom


@dataclass(frozen=True)
class State:
    ranks: tuple[Rank, ...]
    counters: tuple[tuple[int, int, int, int], ...]  # announced, staged, produced, consumed
    notes: tuple[tuple[int, ...], ...]  # of each rank, by call modulo announcements: number of the call
    pieces: tuple[tuple[int, ...], ...]  # of each rank, by slot: the round staged for others
    results: tuple[tuple[int, ...], ...]  # likewise: the round produced

    def changed(self, **changes: object) -> State:
        return State(**{**self.__dict__, **changes})


def put(rows: tuple, rank: int, place: int | None, value: object) -> tuple:
    """Returns `rows` with one row, or one place of it, replaced."""
    row = value if place is None else (*rows[rank][:place], value, *rows[rank][place + 1 :])
    return (*rows[:rank], row, *rows[rank + 1 :])


class TornError(AssertionError):
    """A reader found something else than it came for."""


@dataclass
class Model:
    script: tuple[tuple[str, int], ...]
    rules: Rules = field(default_factory=Rules)

    def start(self) -> State:
        nothing = tuple((0,) * SLOTS for _ in range(RANKS))
        notes = tuple((0,) * self.rules.announcements for _ in range(RANKS))
        return State((Rank(),) * RANKS, ((0, 0, 0, 0),) * RANKS, notes, nothing, nothing)

    def next(self, state: State) -> Iterator[State]:
        for me in range(RANKS):
            yield from self.phases(state, me)

    def others(self, me: int) -> list[int]:
        return [rank for rank in range(RANKS) if rank != me]

    def phases(self, state: State, me: int) -> Iterator[State]:
        rank = state.ranks[me]
        if rank.call == len(self.script):
            return
        if rank.doing is not None:
            yield self.end(state, me)
        elif not rank.announced:
            slot = (rank.call + 1) % self.rules.announcements
            begun = state.changed(notes=put(state.notes, me, slot, WRITING))
            yield self.do(begun, me, doing=("announce", me))
        elif rank.agreed < RANKS:
            if state.counters[rank.agreed][0] >= rank.call + 1:
                self.look(state, "notes", rank.agreed, rank.call + 1)
                yield self.do(state, me, doing=("agree", rank.agreed))
        else:
            yield from self.moves(state, me)

    def moves(self, state: State, me: int) -> Iterator[State]:
        rank, (kind, rounds) = state.ranks[me], self.script[state.ranks[me].call]
        last = rank.base + rounds
        if kind in (SMALL, DIFFERS) or rank.staged == rank.produced == rank.consumed == last:
            yield self.do(state, me, call=rank.call + 1, announced=False, agreed=0, base=last)
            return
        behind = self.others(me)
        if rank.staged < last and all(state.counters[r][2] >= rank.staged + 1 - self.rules.stage_waits for r in behind):
            begun = state.changed(pieces=put(state.pieces, me, (rank.staged + 1) % SLOTS, WRITING))
            yield self.do(begun, me, doing=("stage", me))
        staged = kind == BROADCAST or all(state.counters[r][1] >= rank.produced + 1 for r in behind)
        read = all(state.counters[r][3] >= rank.produced + 1 - self.rules.produce_waits for r in behind)
        if rank.produced < last and staged and read:
            if kind == ALLREDUCE:
                for other in behind:
                    self.look(state, "pieces", other, rank.produced + 1)
            begun = state.changed(results=put(state.results, me, (rank.produced + 1) % SLOTS, WRITING))
            yield self.do(begun, me, doing=("produce", me))
        if rank.consumed < last:
            whom = 0 if kind == BROADCAST else behind[rank.taken]
            if state.counters[whom][2] >= rank.consumed + 1:
                self.look(state, "results", whom, rank.consumed + 1)
                yield self.do(state, me, doing=("consume", whom))

    def end(self, state: State, me: int) -> State:
        rank = state.ranks[me]
        kind, rounds = self.script[rank.call]
        what, whom = rank.doing
        if what == "announce":
            number = rank.call + 1
            state = state.changed(notes=put(state.notes, me, number % self.rules.announcements, number))
            return self.do(self.publish(state, me, 0, number), me, doing=None, announced=True)
        if what == "agree":
            self.look(state, "notes", whom, rank.call + 1)
            agreed = RANKS if kind == DIFFERS and self.rules.leaves_early and whom != me else rank.agreed + 1
            state = self.do(state, me, doing=None, agreed=agreed)
            return self.leave_out(state, me, rank.base + rounds) if agreed == RANKS else state
        if what == "stage":
            state = state.changed(pieces=put(state.pieces, me, (rank.staged + 1) % SLOTS, rank.staged + 1))
            return self.do(self.publish(state, me, 1, rank.staged + 1), me, doing=None, staged=rank.staged + 1)
        if what == "produce":
            if kind == ALLREDUCE:
                for other in self.others(me):
                    self.look(state, "pieces", other, rank.produced + 1)
            state = state.changed(results=put(state.results, me, (rank.produced + 1) % SLOTS, rank.produced + 1))
            return self.do(self.publish(state, me, 2, rank.produced + 1), me, doing=None, produced=rank.produced + 1)
        self.look(state, "results", whom, rank.consumed + 1)
        if kind == ALLREDUCE and rank.taken < RANKS - 2:
            return self.do(state, me, doing=None, taken=rank.taken + 1)
        state = self.publish(state, me, 3, rank.consumed + 1)
        return self.do(state, me, doing=None, taken=0, consumed=rank.consumed + 1)

    def leave_out(self, state: State, me: int, last: int) -> State:
        """Raises at once the counters of what a broadcast from rank 0 does not need of this rank."""
        if self.script[state.ranks[me].call][0] != BROADCAST:
            return state
        left_out = {"staged": 1, **({"consumed": 3} if me == 0 else {"produced": 2})}
        for name, counter in left_out.items():
            state = self.do(self.publish(state, me, counter, last), me, **{name: last})
        return state

    @staticmethod
    def do(state: State, me: int, **changes: object) -> State:
        return state.changed(ranks=put(state.ranks, me, None, Rank(**{**state.ranks[me].__dict__, **changes})))

    @staticmethod
    def publish(state: State, me: int, counter: int, value: int) -> State:
        return state.changed(counters=put(state.counters, me, counter, value))

    @staticmethod
    def look(state: State, where: str, whom: int, number: int) -> None:
        row = getattr(state, where)[whom]
        if row[number % len(row)] != number:
            raise TornError(f"{where} of rank {whom}: {row}, expected {number}")


def explore(model: Model) -> int:
    """Visits every state that can be reached; returns their number.

    Raises:
        TornError: somebody read what was being written, or something else.
        AssertionError: nobody could go on, and not all had ended.
    """
    start = model.start()
    seen, waiting = {start}, deque([start])
    while waiting:
        state = waiting.popleft()
        following = list(model.next(state))
        assert following or all(rank.call == len(model.script) for rank in state.ranks), f"nobody goes on: {state}"
        for one in following:
            if one not in seen:
                seen.add(one)
                waiting.append(one)
    return len(seen)


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_every_order_everybody_finds_what_it_came_for(name):
    assert explore(Model(SCRIPTS[name])) > 1000


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (((ALLREDUCE, 3),), Rules(stage_waits=SLOTS + 1)),
        (((ALLREDUCE, 3),), Rules(produce_waits=SLOTS + 1)),
        (((SMALL, 0),) * 3, Rules(announcements=1)),
        (((DIFFERS, 0),) * 3, Rules(leaves_early=True)),
    ],
)
def test_a_rule_that_is_loosened_is_caught(script, fault):
    with pytest.raises(TornError):
        explore(Model(script, fault))


def test_a_rule_that_is_too_tight_is_caught():
    with pytest.raises(AssertionError, match="nobody goes on"):
        explore(Model(((ALLREDUCE, 2),), Rules(stage_waits=0)))


# ---------------------------------------------------------------------------------------------- sleeping and waking


def wakings(publisher: str, sleeper: str, sleepers: int = 2) -> bool:
    """Whether, in every order, nobody sleeps on once the counter has been raised from 0 to 1.

    Args:
        publisher: its steps in order: e(xchange the counter), l(ook at the number of sleepers and wake them).
        sleeper: a(dd itself to that number), l(ook at the counter), s(leep if it is what was seen: the kernel looks
            again, as one step).
    """
    start = (
        0,
        0,
        0,
        ((0, None, False),) * sleepers,
    )  # counter, number, publisher's step; of each sleeper: step, what it saw, whether it sleeps
    seen, waiting = {start}, [start]
    while waiting:
        counter, number, step, each = waiting.pop()
        following = []
        if step < len(publisher):
            if publisher[step] == "e":
                following.append((1, number, step + 1, each))
            else:
                woken = tuple((at, saw, False) for at, saw, _ in each) if number else each
                following.append((counter, number, step + 1, woken))
        for i, (at, saw, asleep) in enumerate(each):
            if asleep or at == len(sleeper):
                continue
            add = 1 if sleeper[at] == "a" else 0
            looked = counter if sleeper[at] == "l" else saw
            sleeps = sleeper[at] == "s" and looked == 0 and counter == 0
            changed = (*each[:i], (at + 1, looked, sleeps), *each[i + 1 :])
            following.append((counter, number + add, step, changed))
        if not following and any(asleep for _, _, asleep in each):
            return False
        for one in following:
            if one not in seen:
                seen.add(one)
                waiting.append(one)
    return True


def test_no_waking_is_lost():
    assert wakings("el", "als")


@pytest.mark.parametrize(("publisher", "sleeper"), [("le", "als"), ("el", "lsa")])
def test_another_order_loses_a_waking(publisher, sleeper):
    assert not wakings(publisher, sleeper)
