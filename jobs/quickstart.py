"""What jobs/quickstart.sh says before and after: which torch is about to be downloaded, and how the runs came out.

    quickstart.py torch REPORT                 REPORT from `pip install --dry-run --report`
    quickstart.py table ACCURACY FOLDER...     exit status 1 if a run stayed below ACCURACY

Only Python's standard library: the first half runs before anything is installed.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any


def describe_torch(report: str) -> int:
    """Prints build, size and source of the torch that pip would take."""
    packages = {item["metadata"]["name"]: item for item in json.loads(Path(report).read_text())["install"]}
    torch = packages.get("torch")
    if torch is None:
        print("torch is installed already; none is downloaded")
        return 0
    sizes = {name: size_of(item["download_info"]["url"]) for name, item in packages.items()}
    url = urllib.parse.urlsplit(torch["download_info"]["url"])
    source = url.netloc.rpartition("@")[2] or "this machine's disk"  # without a password that stands in the URL
    print(f"torch {torch['metadata']['version']} ({Path(urllib.parse.unquote(url.path)).name})")
    print(f"    {size_text(sizes['torch'])} from {source}; with what it requires {size_text(total(sizes))}")
    cuda = [name for name in packages if re.match(r"nvidia-|cuda-|triton$", name)]
    if cuda:
        print(f"    This is a CUDA build, with {len(cuda)} packages of libraries. For the small CPU build stop here")
        print("    and run: jobs/quickstart.sh --torch-index URL, with the index of CPU builds that pytorch.org names")
    return 0


def size_of(url: str) -> int | None:
    """Bytes of a local or remote file, without fetching it; None if the server does not say."""
    parts = urllib.parse.urlsplit(url)
    try:
        if parts.scheme == "file":
            return Path(urllib.request.url2pathname(parts.path)).stat().st_size
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=15) as answer:
            length: str | None = answer.headers.get("Content-Length")
            return int(length) if length else None
    except (OSError, ValueError):  # URLError is an OSError
        return None


def total(sizes: dict[str, int | None]) -> int | None:
    """The sum of the sizes, or None if torch's own is not known: the rest would mislead."""
    return None if sizes["torch"] is None else sum(size or 0 for size in sizes.values())


def size_text(size: int | None) -> str:
    return "an unknown number of MB" if size is None else f"{size / 1e6:,.0f} MB"


def print_table(wanted: float, folders: list[str]) -> int:
    """Prints one line for each run's summary; returns 1 if one is below the wanted accuracy."""
    summaries = [json.loads((Path(folder) / "summary.json").read_text()) for folder in folders]
    print(f"{'algorithm':<14}{'ranks':>7}{'held-out accuracy':>20}{'samples/s':>12}{'mean staleness':>17}")
    for summary in summaries:
        print(
            f"{summary['algorithm']:<14}{summary['ranks']:>7}{summary['held_out_accuracy']:>20.4f}"
            f"{summary['samples_per_second']:>12,.0f}{staleness(summary):>17}"
        )
    below = [summary["algorithm"] for summary in summaries if summary["held_out_accuracy"] < wanted]
    if below:
        print(f"below {wanted}: {', '.join(below)}")
    return 1 if below else 0


def staleness(summary: dict[str, Any]) -> str:
    """The mean over all commits; the synchronous way has none."""
    mean = summary.get("mean_staleness")
    return "-" if mean is None else f"{mean:.2f}"


def main(what: str, *arguments: str) -> int:
    if what == "torch":
        return describe_torch(arguments[0])
    return print_table(float(arguments[0]), list(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
