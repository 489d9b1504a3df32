"""The random numbers of one rank: seeded, saved and restored; torch's, numpy's and Python's global generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seeds the three generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_for(seed: int, rank: int, steps: int) -> int:
    """Returns the seed of a rank that joins after `tasks` steps: the same each time, and unlike any other rank's."""
    digest = hashlib.blake2b(f"{seed} {rank} {steps}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def random_state() -> dict[str, Any]:
    """Returns the state of the generators, for a torch file."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Makes the generators go on from `state`."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
