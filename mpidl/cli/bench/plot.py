"""Results as a PNG: curves over sizes where a benchmark has sizes, bars where it has not. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpidl.cli.bench import ratios
from mpidl.cli.bench.results import Result
from mpidl.cli.bench.targets import size_text


def draw(results: Sequence[Result], file: Path) -> bool:
    """Draws one benchmark's results, of one run or of one on each MPI.

    Returns:
        False, without a file, if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure: Any = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    sized = all("nbytes" in parameters for result in results for parameters in result.cases.values())
    (_curves if sized else _bars)(figure, results)
    figure.suptitle(f"mpidl bench {results[0].run['benchmark']}{_caution(results)}", fontsize=12)
    figure.savefig(file, dpi=110)
    return True


def _caution(results: Sequence[Result]) -> str:
    return " (a quick run: no figures)" if any(result.run["quick"] for result in results) else ""


def _title(result: Result) -> str:
    mpi = result.run["versions"].get("mpi")
    return f"{mpi}, {result.run['ranks']} ranks" if mpi else "one process"


def _curves(figure: Any, results: Sequence[Result]) -> None:
    """A row for each run, a column for each place; bytes of one array per second over its size."""
    every = {parameters["nbytes"] for result in results for parameters in result.cases.values()}
    places = list(dict.fromkeys(parameters["place"] for parameters in results[0].cases.values()))
    figure.set_size_inches(6.5 * len(places), 4.2 * len(results))
    panels = figure.subplots(len(results), len(places), squeeze=False, sharex=True, sharey=True)
    for row, result in zip(panels, results, strict=True):
        for panel, place in zip(row, places, strict=True):
            for name, color in _colors(result).items():
                sizes, low, middle, high = _curve(result, name, place)
                if sizes:
                    panel.plot(sizes, middle, marker="o", markersize=3.5, label=name, color=color)
                    panel.fill_between(sizes, low, high, alpha=0.2, color=color, linewidth=0)
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted(every), [size_text(nbytes) for nbytes in sorted(every)], fontsize=7, rotation=30)
            panel.minorticks_off()
            panel.set(yscale="log", title=f"{_title(result)}, {place}", ylabel="GB/s: array / time")
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)


def _curve(result: Result, name: str, place: str) -> tuple[list[int], list[float], list[float], list[float]]:
    points = [
        (one.parameters["nbytes"], *(one.parameters["nbytes"] / 1e9 / t for t in ratios.quartiles(one.seconds)))
        for one in result.series
        if one.contender == name and one.parameters["place"] == place and one.seconds
    ]
    sizes, fast, middle, slow = (list(column) for column in zip(*points, strict=True)) if points else ([],) * 4
    return sizes, slow, middle, fast


def _bars(figure: Any, results: Sequence[Result]) -> None:
    """A panel for each case: two columns, or one for each run; milliseconds of one operation."""
    shown = [[(result, case) for case in result.cases] for result in results]
    if len(shown) == 1:
        shown = [shown[0][::2], shown[0][1::2]]
    rows = max(len(column) for column in shown)
    bars = max(len(_colors(result)) for result in results)
    figure.set_size_inches(6.5 * len(shown), rows * (0.75 + 0.24 * bars))
    panels = figure.subplots(rows, len(shown), squeeze=False)
    for place, column in enumerate(shown):
        for panel, (result, case) in zip(panels[:, place], column, strict=False):
            _bars_of_case(panel, result, case)
        for panel in panels[len(column) :, place]:
            panel.set_axis_off()


def _bars_of_case(panel: Any, result: Result, case: str) -> None:
    series = [one for one in result.series if one.case == case and one.seconds]
    for place, one in enumerate(series):
        low, middle, high = (1e3 * seconds for seconds in ratios.quartiles(one.seconds))
        whisker = [[middle - low], [high - middle]]
        panel.barh(place, middle, xerr=whisker, color=_colors(result)[one.contender], error_kw={"lw": 1})
        panel.annotate(f" {middle:.3g}", (high, place), va="center", fontsize=8)
    panel.set_yticks(range(len(series)), [one.contender for one in series], fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_title(f"{_title(result)}: {case}", fontsize=9)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlabel("ms, median and quartiles; shorter is better", fontsize=7)


def _colors(result: Result) -> dict[str, str]:
    """Contender -> its colour; the same in every panel."""
    names = dict.fromkeys(one.contender for one in result.series)
    return {name: f"C{number % 10}" for number, name in enumerate(sorted(names))}
