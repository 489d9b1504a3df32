"""What other files show of ranks that share memory, shown again of ranks that do not, or not all of them.

The tests are imported; only the communicator that they get differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from copies import copied
from test_every_size import test_all_collectives, test_means
from test_mismatch import test_all_ranks_get_one_text_that_names_both_sides, test_only_the_call_that_differs_fails
from test_synchronous import (
    test_equals_one_rank_with_all_samples,
    test_ragged_batches_are_weighed_by_their_samples,
    test_uneven_loaders,
)

import mpidl
from mpidl.collectives import cost_model

__all__ = [
    "test_all_collectives",
    "test_all_ranks_get_one_text_that_names_both_sides",
    "test_equals_one_rank_with_all_samples",
    "test_means",
    "test_only_the_call_that_differs_fails",
    "test_ragged_batches_are_weighed_by_their_samples",
    "test_uneven_loaders",
]

WITH_OTHERS = True
SIZES = (3, 4)
pytestmark = pytest.mark.whole_product  # some of it is skipped
WAYS = {"switched off": ("MPIDL_SHARED_MEMORY", "0")} | {
    f"nodes of {k}": ("MPIDL_NODE_SIZE", str(k)) for k in (1, 2, 3)
}


@pytest.fixture(params=WAYS)
def way(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def comm(comm: mpidl.Communicator, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[mpidl.Communicator]:
    """A copy of the communicator whose ranks cannot share memory; between nodes lanes carry everything they can."""
    if comm.size == 3 and way in ("nodes of 1", "nodes of 3"):
        pytest.skip("shown by 4 ranks")
    monkeypatch.setattr(cost_model, "choose", lambda *_, **__: "direct")
    with copied(comm, monkeypatch, *WAYS[way]) as copy:
        yield copy
