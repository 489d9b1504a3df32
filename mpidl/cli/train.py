"""`mpidl train`: what its arguments are and what its exit status says; the run itself stands in `mpidl.training`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from mpidl.native import environment
from mpidl.training.algorithms import BY_NAME
from mpidl.training.settings import Settings

_positive = click.IntRange(min=1)


@click.command("train")
@click.argument("job", type=click.Path(path_type=Path))
@click.argument("job_options", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--algorithm",
    type=click.Choice(tuple(BY_NAME)),
    default="synchronous",
    show_default=True,
    help="synchronous: mean gradient by allreduce. Most others: a parameter server by one-sided MPI; see below.",
)
@click.option("--epochs", type=_positive, default=20, show_default=True, help="Passes over the training data.")
@click.option("--batch-size", type=_positive, default=16, show_default=True, help="Samples per rank and step.")
@click.option(
    "--communication-window",
    type=_positive,
    help="Local steps per exchange; no effect on --algorithm synchronous.  [default: see below]",
)
@click.option(
    "--max-clock-spread",
    type=click.IntRange(min=0),
    metavar="N",
    help="No worker is more than N exchanges ahead of the slowest; asynchronous only.  [default: no worker waits]",
)
@click.option(
    "--set",
    "hyperparameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="A hyperparameter of the algorithm, as its class has it; may be given several times.",
)
@click.option(
    "--servers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How many of the last ranks only hold the model for the others; asynchronous only.",
)
@click.option(
    "--shard",
    is_flag=True,
    help="One copy of the weights per node; each rank holds its part of the optimiser's state.  [synchronous only]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of model, order and dropout.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for metrics, checkpoints and summary.  [default: runs/JOB-ALGORITHM]",
)
@click.option("--overwrite", is_flag=True, help="Replace the outputs of an earlier run in --output.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the newest whole checkpoint in --output; start anew if there is none.",
)
@click.option("--keep", type=_positive, default=2, show_default=True, help="How many of the newest checkpoints stay.")
@click.option(
    "--checkpoint-every",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Write checkpoints within epochs too, at the first line of metrics after so many seconds.",
)
@click.option("--log-every", type=_positive, default=10, show_default=True, help="Steps per line of metrics.")
def command(job: Path, **options: Any) -> None:
    """Train the job in the Python file JOB on the ranks that mpirun, srun or `mpidl run` started.

    \b
    Example:
      mpidl run -n 4 -- mpidl train jobs/digits.py --algorithm downpour --epochs 12 --output runs/x -- --lr 0.1
      mpidl run -n 4 -- mpidl train jobs/digits.py --algorithm aeasgd --set beta=0.5 --max-clock-spread 8

    \b
    Algorithms, their default --communication-window, and what --set takes:
      {algorithms}

    A job does nothing when it is imported and has these functions:

    \b
      model() -> torch.nn.Module
      loss(model, batch) -> Tensor          the mean over the batch
      data(train: bool) -> Dataset
      optimizer(parameters) -> Optimizer    optional; SGD, lr 0.05, momentum 0.9
      scheduler(optimizer) -> LRScheduler   optional; stepped after each epoch
      accuracy(model, batch) -> number      optional; the mean over the batch
      add_options(parser)                   optional; an argparse parser

    What stands after `--` is parsed by the job's own parser; the result is set as `options` in the job's module
    before its other functions are called. `-- --help` lists these options. `mpirun -n 4 python JOB ...` does the same
    as `mpidl train JOB ...` if the job ends with `if __name__ == "__main__": mpidl.cli.run_job(__file__)`.

    --output receives summary.json; metrics.jsonl, or one metrics.<rank>.jsonl per worker if the algorithm is
    asynchronous; and checkpoints/<number>/, written at the end of every epoch and when training stops:
    model.safetensors, training.pt, what each rank alone holds, and manifest.json with the SHA-256 of each file.
    A checkpoint appears whole, by rename, and only then is an older one removed.

    With --resume a synchronous run on as many ranks as before ends bit for bit as if it had never stopped. On another
    number of ranks parameters and optimiser are exact and the shares of the data are cut anew. An asynchronous run
    goes on from the exact center and clock, each worker from what it last saved at a commit of its own. The job,
    --algorithm, --seed, --batch-size, --communication-window, --set and the job's options must be those of the run;
    all else, and the number of ranks, may change. A damaged checkpoint is named and the one before it is used. Metrics
    after the checkpoint are removed, since those steps come again; figures in the summary are those of all parts.
    Generators of random numbers that a job makes for itself are not saved: it should draw from the global ones of
    torch, numpy and Python.

    SIGUSR1, SIGTERM or Ctrl-C, on any rank, asks all that train to stop after their step (asynchronous: after their
    commit) and to save; servers serve until they have. One more signal, a second later, ends the job at once.

    \b
    Exit status:
      0   trained to the end
      1   failed; also: trained, but the last checkpoint could not be written
      2   refused before training; one sentence says why
      75  stopped on request: every rank ended its step, checkpoint and summary are written; go on by --resume
    """
    raise SystemExit(_train(_settings(job, **options)))


def _settings(
    job: Path, *, algorithm: str, output: Path | None, communication_window: int | None, **others: Any
) -> Settings:
    """Returns the settings that the options ask for; an option has the name of its setting."""
    return Settings(
        job=job,
        algorithm=algorithm,
        output=output or Path("runs") / f"{job.stem}-{algorithm}",
        communication_window=communication_window or BY_NAME[algorithm].window,
        command=shlex.join(sys.argv),
        terminal_columns=_columns(),
        **others,
    )


def _with_algorithms(text: str) -> str:
    """Puts the algorithms into the help, indented as their placeholder is."""
    before, after = text.split("{algorithms}")
    indent = before[before.rindex("\n") :]
    lines = []
    for name, algorithm in BY_NAME.items():
        window = "" if name == "synchronous" else str(algorithm.window)
        more = f" [{', '.join(algorithm.hyperparameters)}]" if algorithm.hyperparameters else ""
        lines.append(f"{name:<16}{window:>4}  {algorithm.says}{more}")
    return before + indent.join(lines) + after


command.help = _with_algorithms(command.help or "")


def _columns() -> int | None:
    """The width of the terminal behind mpirun's pipe, as `mpidl run` saw it."""
    return environment.TERMINAL.read()


def _train(settings: Settings) -> int:
    from mpidl.mpi import runtime
    from mpidl.training.stop import StopRequest

    stop = StopRequest()
    runtime.on_stop_signal(stop.ask)  # before torch is imported: seconds in which a signal would kill

    import mpidl
    from mpidl.training import run
    from mpidl.training.job import HelpAskedError
    from mpidl.training.refusal import RefusedError

    try:
        return run.run(settings, stop)
    except RefusedError:
        if mpidl.world().rank == 0:
            raise
        return 2  # every rank has the same message: one prints it
    except HelpAskedError as asked:
        if mpidl.world().rank == 0:
            click.echo(asked.text)
        return 0
