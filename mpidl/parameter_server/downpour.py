"""DOWNPOUR as Hermans' thesis (Eq. 2.11-2.12) and dist-keras have it: workers commit what their local steps moved.

Dean's own Downpour, which sends gradients to an Adagrad at the server, is another algorithm.
"""

from __future__ import annotations

from mpidl.parameter_server.worker.delta import DeltaWorker


class Downpour(DeltaWorker):
    """Commits the sum of the local steps' moves: theta_lambda - theta_0; the center adds it.

    With many workers or a long window the center overshoots (thesis Fig. 2.13, 3.2): then use `AGN`. Source:
    J. Hermans, *On Scalable Deep Learning and Parallelizing Gradient Descent*, 2017, chapter 2; after Dean et al. 2012.

    Args:
        optimizer: takes the local steps; any torch optimiser, holding parameters of `model` only. Its state stays with
            this worker.
        model: a module, or a list of modules and parameters; parameters and buffers are broadcast from rank 0 in place.
            The center starts from them.
        communication_window: local steps per exchange, 1 or more; 5 by default, as in dist-keras.
        overlap: local steps during which a thread makes the exchange, at most `communication_window`; 0, the default:
            the worker waits for its exchange. Needs an MPI with threads (THREAD_MULTIPLE).
        max_clock_spread: exchanges that a worker may be ahead of the slowest one (SSP); None, the default: any number.
        comm: the ranks that train together; default `mpidl.world()`. The center lies on its servers, if it has any.
        buffers: "mean", the default, averages BatchNorm statistics and other floating buffers in `finish()`; "local"
            leaves them.

    Raises:
        ArgumentError: `overlap` together with `max_clock_spread`; optimiser and model do not belong together, or an
            argument cannot work; alike on all ranks.
        DtypeError: a parameter is not floating, on a device that cannot be used, or gets sparse gradients; or they lie
            on several devices.
        MismatchError: the ranks gave different models or arguments.
    """
