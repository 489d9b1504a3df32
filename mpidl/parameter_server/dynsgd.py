"""DynSGD: the staler a commit, the less of it is added."""

from __future__ import annotations

from mpidl.parameter_server.worker.delta import DeltaWorker


class DynSGD(DeltaWorker):
    """Commits the sum of the local steps' moves, divided by its staleness + 1.

    Staleness is the count of others' commits since this worker's pull, known exactly before the commit: no two commits
    see the same one. With n workers it is about n - 1, so that the center moves about as fast as with one worker: use
    it for its stability. With one worker this is `Downpour`. Source: J. Jiang et al., *Heterogeneity-aware Distributed
    Parameter Servers*, SIGMOD 2017, in the form of Hermans' thesis, Eq. 2.13 and its algorithm.

    Args and errors as `DeltaWorker`.
    """

    def _scale(self, staleness: int) -> float:
        return 1.0 / (staleness + 1)
