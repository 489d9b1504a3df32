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

    Args and errors as `DeltaWorker`.
    """

    def _divisor(self, steps: int) -> int:
        return steps
