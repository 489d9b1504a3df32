"""leaver.py WHERE HOW: rank 1 leaves in the way HOW while the others are in WHERE; test_leaving.py starts it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import mpidl

LEAVER = 1


def raise_exception() -> None:
    raise RuntimeError("planted reason")


def die_of(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def fail_in_autograd_hook() -> None:
    import torch

    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: raise_exception())
    x.sum().backward()


class Broken:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        raise RuntimeError("planted reason")


def fail_in_data_loader_worker() -> None:
    from torch.utils.data import DataLoader

    for _ in DataLoader(Broken(), num_workers=1):  # type: ignore[arg-type]
        pass


def fail_in_thread() -> None:
    thread = threading.Thread(target=raise_exception, name="planted")
    thread.start()
    thread.join()


WAYS: dict[str, Callable[[], Any]] = {
    "exception": raise_exception,
    "exit-3": lambda: sys.exit(3),
    "exit-0": lambda: sys.exit(0),
    "exit-text": lambda: sys.exit("planted text"),
    "console-script": lambda: 3,  # main returns it: sys.exit(main())
    "keyboard-interrupt": lambda: die_of(signal.SIGINT),
    "sigterm": lambda: die_of(signal.SIGTERM),
    "os-exit-0": lambda: os._exit(0),
    "os-exit-3": lambda: os._exit(3),
    "sigkill": lambda: die_of(signal.SIGKILL),
    "autograd-hook": fail_in_autograd_hook,
    "data-loader-worker": fail_in_data_loader_worker,
    "thread": fail_in_thread,
}


def leave(how: str) -> Any:
    time.sleep(0.3)  # the others wait by now
    print(f"leaving at {time.time():.2f}", flush=True)
    return WAYS[how]()


def plain(how: str) -> Any:
    """Nothing is open on the leaving rank."""
    comm = mpidl.world()
    comm.allreduce(np.ones(3))
    if comm.rank == LEAVER:
        return leave(how)
    comm.allreduce(np.ones(3))
    return 0


def constructor(how: str) -> Any:
    import torch

    comm = mpidl.world()
    comm.barrier()
    if comm.rank == LEAVER:
        return leave(how)
    model = torch.nn.Linear(2, 1)
    mpidl.Synchronous(torch.optim.SGD(model.parameters(), lr=0.1), model)
    return 0


def train(optimizer_class: Any, how: str, seconds: float) -> Any:
    import torch

    model = torch.nn.Linear(2, 1)
    optimizer = optimizer_class(torch.optim.SGD(model.parameters(), lr=0.1), model)
    rank, began, step = mpidl.world().rank, time.monotonic(), 0
    while step < 2 or time.monotonic() - began < seconds:
        if step == 2 and rank == LEAVER:
            status = leave(how)
            if status is not None:
                return status
        optimizer.zero_grad()
        try:
            model(torch.ones(4, 2)).mean().backward()
        except mpidl.RankFailedError as error:
            print(f"rank {rank} got RankFailedError: {error}", flush=True)
            time.sleep(0.3)  # the others get it too before this one ends the job
            raise
        optimizer.step()
        step += 1
    optimizer.finish()
    return 0


def synchronous(how: str) -> Any:
    return train(mpidl.Synchronous, how, 20)


def downpour(how: str) -> Any:
    return train(mpidl.Downpour, how, 20)


def served(how: str) -> Any:
    """Rank 1 is a worker, rank 2 a server, which gets the signal if HOW is server-SIGNAL; torch would start slowly."""
    from mpidl.parameter_server.center.center import Center

    comm = mpidl.world(servers=1)
    victim = comm.dedicated_servers.whole.placement.processes[2].pid  # type: ignore[union-attr]
    for name in ("SIGTERM", "SIGINT", "SIGKILL"):
        WAYS[f"server-{name}"] = lambda number=signal.Signals[name]: os.kill(victim, number)
    center = Center(comm.topology, np.zeros(1000), "planted", comm.dedicated_servers)
    began, steps = time.monotonic(), 0
    while time.monotonic() - began < 20:
        if steps == 20 and comm.rank == LEAVER:
            leave(how)
        center.look()
        center.commit(np.ones(1000))
        time.sleep(0.01)
        steps += 1
    center.close()
    return 0


def main() -> Any:
    places = {
        "plain": plain,
        "constructor": constructor,
        "synchronous": synchronous,
        "downpour": downpour,
        "served": served,
    }
    return places[sys.argv[1]](sys.argv[2])


if __name__ == "__main__":
    sys.exit(main())
