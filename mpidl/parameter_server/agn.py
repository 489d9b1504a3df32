"""AGN, accumulated gradient normalisation (Hermans' thesis, chapter 3): workers commit the mean of their local moves.

dist-keras calls this rule ADAG; in mpidl ADAG is the rule of the thesis' chapter 4.
"""

from __future__ import annotations

from mpidl.parameter_server.worker.delta import DeltaWorker


class AGN(DeltaWorker):
    """Commits the mean of the local steps' moves: (theta_lambda - theta_0) / lambda; the center adds it.

    A shorter last window is divided by its real length. With `communication_window=1` this is `Downpour`. A window of
    about 0.64 times the number of workers or more keeps the center stable. Source: thesis Eq. 3.1; Hermans et al.,
    *Accumulated Gradient Normalization*, ACML 2017.

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

    def _divisor(self, steps: int) -> int:
        return steps
