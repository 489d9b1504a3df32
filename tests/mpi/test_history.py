"""What workers saw while all ran free, held against a center that does one commit after the other (`history`)."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
from history import Commit, Pull, Shape, complaints

from mpidl.parameter_server.center.center import Center, Requirements

WITH_OTHERS = True
RANKS = (4, 8)
SERVERS = (0, 1, 2)
SIZES = (2, 4, 8, (2, 2), (6, 2))
ELEMENTS, EACH = 257, 12  # elements of the center, commits of a worker


@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("way", ["commit, then pull", "commit and pull", "exchange"])
def test_free_runners(world_comm, way):
    comm, locked = world_comm, way == "exchange"
    ranks = comm.topology.duplicate("test of histories")
    server = Center(ranks, np.zeros(ELEMENTS), "test", comm.dedicated_servers, Requirements(locks=locked))
    shards = tuple(sorted((part.start, part.start + part.count) for part in server._order))
    shape = Shape(EACH * comm.size, ELEMENTS, shards)
    commits, pulls, source = [], [], random.Random(comm.rank)
    ranks.barrier("start together")
    for k in range(EACH):
        name, center, began = comm.rank * EACH + k, np.empty(ELEMENTS), time.monotonic()
        delta = shape.delta(name)
        if locked:
            number, clock = server.exchange(lambda here, now, delta=delta: now + delta[here], center)
            commits.append(Commit(comm.rank, name, number, began, time.monotonic()))
        elif way == "commit and pull":
            number, clock = server.commit_and_pull(delta, center)
            commits.append(Commit(comm.rank, name, number, began, time.monotonic()))
        else:
            number = server.commit(delta)
            commits.append(Commit(comm.rank, name, number, began, time.monotonic()))
            began = time.monotonic()
            clock = server.pull(center)
        pulls.append(Pull(comm.rank, clock, center, began, time.monotonic()))
        time.sleep(source.random() * 1e-3)
    told = [vars(commit) for commit in commits], [{**vars(pull), "center": pull.center.tolist()} for pull in pulls]
    everyone = [json.loads(text) for text in ranks.gather_bytes(json.dumps(told).encode(), "histories")]
    commits = [Commit(**one) for theirs, _ in everyone for one in theirs]
    pulls = [Pull(**{**one, "center": np.array(one["center"])}) for _, theirs in everyone for one in theirs]
    if comm.rank == 0:
        assert list(complaints(shape, commits, pulls, whole_shards=locked)) == []
        assert any(pull.clock < EACH * comm.size for pull in pulls)
    last = np.empty(ELEMENTS)
    assert server.pull(last) == shape.commits
    assert np.array_equal(last, sum(shape.delta(name) for name in range(shape.commits)))
    ranks.barrier("all have read")
    server.close()
    ranks.free()
