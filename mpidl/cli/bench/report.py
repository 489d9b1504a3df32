"""Results as a page of Markdown: what it ran on, every contender in every case, and the targets."""

from __future__ import annotations

from collections.abc import Sequence

from mpidl.cli.bench import ratios
from mpidl.cli.bench.harness import Series
from mpidl.cli.bench.judging import Verdict
from mpidl.cli.bench.machine import BUSY
from mpidl.cli.bench.results import Result
from mpidl.cli.bench.targets import BY, NARROW


def page(results: Sequence[Result], verdicts: Sequence[Verdict]) -> str:
    """Returns the page on one benchmark: one run, or one on each MPI."""
    lines = [f"# {results[0].run['benchmark']}", ""]
    for result in results:
        lines += [*_circumstances(result), ""]
    lines += ["## Targets", "", *_targets(verdicts), ""]
    for result in results:
        lines += [*_choices(result), *_table(result), ""]
    return "\n".join(lines).rstrip() + "\n"


def _circumstances(result: Result) -> list[str]:
    run, end = result.run, result.end
    machine, ranks = run["hardware"], run["ranks"]
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    each = f"each of {ranks} ranks" if ranks > 1 else "one process"
    lines = [
        f"Command, as {each}, {run['date']}: `{run['command']}`",
        f"Hardware: {machine['cores']} cores of {machine['processor']} (family {machine['family']}, "
        f"{' '.join(machine['instructions']) or 'no vector instructions'}; {caches}), {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}. Pinned to core {', '.join(map(str, run['cores']))}; one thread a rank.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in run["versions"].items()) + ".",
        f"{run['rounds']} rounds after {run['warm_ups']} to warm up, in {end['seconds']:.0f} s. Work of others: "
        f"{run['load']['busy_cores']} cores before, {end['load']['busy_cores']} after; the ranks lost their cores "
        f"{sum(end['preemptions'])} times.",
    ]
    if end.get("apart"):
        lines.append(f"**After {end['apart']} of {len(result.cases)} cases the cores shared no cache**; mpidl saw it.")
    if run["quick"]:
        lines.append("**A quick run: it shows that everything works, and no figure.**")
    if is_busy(result):
        lines.append("**The machine was busy with something else: do not believe these figures.**")
    return [f"- {line}" for line in lines]


def is_busy(result: Result) -> bool:
    """Whether something else worked before or after."""
    return bool(max(result.run["load"]["busy_cores"], result.end["load"]["busy_cores"]) > BUSY)


_COLUMNS = ("target", "case", "on", "contender", "against", "asked for", "reached (quartiles of rounds)", "sure within")
_KINDS = {"speed": "speed", "time": "time", "excess": "excess time", "seconds": "seconds more"}


def _targets(verdicts: Sequence[Verdict]) -> list[str]:
    rows = [[*_COLUMNS, "verdict"]]
    for one in verdicts:
        target, figure = one.target, one.estimate
        asked = f"{_KINDS[target.quantity]} {target.relation} {target.bound:g}"
        reached = "" if figure is None else f"{_short(figure.value)} ({_range(figure.quartiles)})"
        sure = "" if figure is None else _range(figure.sure)
        note = f"**{one.verdict}**: {one.note}" if one.note else f"**{one.verdict}**"
        rows.append([target.name, one.case, one.mpi, target.contender, target.peer, asked, reached, sure, note])
    return _aligned(rows)


def _choices(result: Result) -> list[str]:
    """Where an algorithm was chosen between nodes: how much faster the best one was."""
    rows = [["case", "chosen", "fastest", "its speed against the chosen one's (quartiles of rounds)"]]
    prefix = BY.format("")
    for case, parameters in result.cases.items():
        chosen = result.find(case, parameters.get("chosen", ""))
        measured = [one for one in result.series if one.case == case and one.contender.startswith(prefix)]
        alike = [one for one in measured if one.seconds and one.contender != NARROW]
        if chosen is not None and chosen in alike:
            best = min(alike, key=lambda one: ratios.quartiles(one.seconds)[1])
            against = ratios.ratio(chosen.seconds, best.seconds)
            figure = "" if best is chosen else f"{_short(against.value)} ({_range(against.quartiles)})"
            rows.append([case, chosen.contender, best.contender, figure])
    return ["## Chosen algorithms", "", *_aligned(rows), ""] if len(rows) > 1 else []


def _table(result: Result) -> list[str]:
    reference = result.run["reference"]
    on = f" on {result.run['versions']['mpi']}, {result.run['ranks']} ranks" if result.mpi else ""
    fast = f"times as fast as {reference} (quartiles of rounds)"
    rows = [["case", "contender", "median ms (quartiles)", result.run["rate"], fast]]
    rows += [[one.case, one.contender, *_figures(one, result.find(one.case, reference))] for one in result.series]
    return [f"## All contenders{on}", "", *_aligned(rows)]


def _figures(series: Series, reference: Series | None) -> tuple[str, str, str]:
    if series.complaint:
        return f"**wrong result: {series.complaint}**", "", ""
    low, middle, high = ratios.quartiles(series.seconds)
    milliseconds = f"{_short(1e3 * middle)} ({_range((1e3 * low, 1e3 * high))})"
    rate = _short(series.amount / middle)
    if reference is None or reference.complaint or reference is series:
        return milliseconds, rate, "1" if reference is series else ""
    against = ratios.ratio(reference.seconds, series.seconds)
    return milliseconds, rate, f"{_short(against.value)} ({_range(against.quartiles)})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table that is also one to the eye."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _range(pair: tuple[float, float]) -> str:
    return f"{_short(pair[0])} - {_short(pair[1])}"


def _short(x: float) -> str:
    """Three significant digits, without an exponent where that is legible."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
