"""DOWNPOUR as Hermans' thesis (Eq. 2.11-2.12) and dist-keras have it: workers commit what their local steps moved.

Dean's own Downpour, which sends gradients to an Adagrad at the server, is another algorithm.
"""

from __future__ import annotations

from mpidl.parameter_server.worker.delta import DeltaWorker


class Downpour(DeltaWorker):
    """Commits the sum of the local steps' moves: theta_lambda - theta_0; the center adds it.

    With many workers or a long window the center overshoots (thesis Fig. 2.13, 3.2): then use `AGN`. Source:
    J. Hermans, *On Scalable Deep Learning and Parallelizing Gradient Descent*, 2017, chapter 2; after Dean et al. 2012.

    Args and errors as `DeltaWorker`.
    """
