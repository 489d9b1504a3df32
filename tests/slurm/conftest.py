"""The fixture `cluster`: one SLURM cluster for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(f"a SLURM cluster on this machine needs: {lacking}")
    running = Cluster()
    try:
        yield running
    finally:
        running.close()
