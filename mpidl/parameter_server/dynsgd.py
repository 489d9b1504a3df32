"""DynSGD: the staler a commit, the less of it is added."""

from __future__ import annotations

from mpidl.parameter_server.worker.delta import DeltaWorker


class DynSGD(DeltaWorker):
    """Commits the sum of the local steps' moves, divided by its staleness + 1.

    Staleness is the count of other workers' commits since this worker's pull, known exactly before the commit: no two
    commits that start from the same center have the same staleness. With n workers it is about n - 1, so that the
    center moves about as fast as with one worker: `DynSGD` is used for its stability. With one worker this is
    `Downpour`. Source: J. Jiang et al., *Heterogeneity-aware Distributed Parameter Servers*, SIGMOD 2017, in the form
    of Hermans' thesis, Eq. 2.13 and its algorithm.

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

    def _scale(self, staleness: int) -> float:
        return 1.0 / (staleness + 1)
