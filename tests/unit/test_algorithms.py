"""The tables of `mpidl train` agree with the classes, and what is said on the command line is refused by name."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import click.testing
import pytest

import mpidl
from mpidl.cli.train import command
from mpidl.optim import validation
from mpidl.parameter_server.worker.base import Worker
from mpidl.training import algorithms
from mpidl.training.settings import Settings

COMMON = {"optimizer", "model", "communication_window", "max_clock_spread", "comm", "buffers"}
TRAINED = [name for name in algorithms.BY_NAME if name != "synchronous"]
SETTINGS = Settings(Path("job.py"), Path("out"))


@pytest.mark.parametrize("name", TRAINED)
def test_every_hyperparameter_of_a_class_can_be_set_and_none_that_it_lacks(name):
    algorithm = algorithms.BY_NAME[name]
    kind = getattr(mpidl, algorithm.class_name)
    parameters = inspect.signature(kind).parameters
    assert set(parameters) - COMMON == set(algorithm.hyperparameters)
    assert set(parameters) - {"optimizer", "model", "comm", "buffers"} == set(validation.checks(kind))
    assert algorithm.window == (algorithm.default_window or parameters["communication_window"].default)
    assert algorithm.class_name.lower() == name.replace("-", "")


@pytest.mark.parametrize("name", TRAINED)
def test_help_shows_each_argument_with_its_explanation(name):
    kind = getattr(mpidl, algorithms.BY_NAME[name].class_name)
    parameters = inspect.signature(kind).parameters
    assert all(p.default is not p.empty for p in parameters.values() if p.kind is p.KEYWORD_ONLY)
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    if issubclass(kind, Worker):
        assert all(f"\n        {argument}: " in kind.__doc__ for argument in parameters)


def test_a_value_that_cannot_work_is_refused_by_the_annotation_of_its_argument():
    for kind, given, says in (
        (mpidl.ADAG, {"gamma": 0}, "gamma=0; expected a number above 0"),
        (mpidl.AEASGD, {"rho": None, "learning_rate": -1.0}, "learning_rate=-1.0; expected a number above 0"),
        (mpidl.DCASGD, {"lambda_": True}, "lambda_=True; expected a number above 0"),
        (mpidl.Downpour, {"overlap": -1}, "overlap=-1; expected a whole number, 0 or more"),
        (mpidl.DiLoCo, {"communication_window": 2.0}, "communication_window=2.0; expected a whole number, 1 or more"),
    ):
        assert str(validation.problem(kind, given)) == says
    assert validation.problem(mpidl.Downpour, {"max_clock_spread": None, "overlap": 0}) is None


def test_what_is_set_reaches_the_class_as_numbers():
    settings = replace(SETTINGS, algorithm="distbelief", hyperparameters=("n_push=2", "gamma=1e-2"), max_clock_spread=3)
    algorithms.check(settings)
    assert algorithms.BY_NAME["distbelief"].arguments(settings) == {
        "communication_window": 3,
        "max_clock_spread": 3,
        "n_push": 2,
        "gamma": 0.01,
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"algorithm": "adag", "hyperparameters": ("gamma",)}, "--set gamma: expected NAME=VALUE"),
        ({"algorithm": "adag", "hyperparameters": ("beta=1",)}, "--algorithm adag has gamma"),
        ({"algorithm": "agn", "hyperparameters": ("beta=1",)}, "--algorithm agn has overlap"),
        ({"algorithm": "distbelief", "hyperparameters": ("n_push=2.5",)}, "n_push=2.5: expected a whole number"),
        ({"algorithm": "adag", "hyperparameters": ("gamma=x",)}, "gamma=x: expected a number"),
        ({"algorithm": "adag", "hyperparameters": ("gamma=1", "gamma=2")}, "gamma was given before"),
        ({"servers": 1}, "synchronous has no parameter server"),
        ({"max_clock_spread": 1}, "all ranks take their steps together anyway"),
        ({"algorithm": "gem", "shard": True}, "gem cannot share weights"),
    ],
)
def test_what_an_algorithm_has_no_use_for_is_refused(given, says):
    with pytest.raises(mpidl.ArgumentError, match=says):
        algorithms.check(replace(SETTINGS, **given))


def test_help_lists_every_algorithm_with_what_it_takes():
    text = click.testing.CliRunner().invoke(command, ["--help"], terminal_width=120).output
    assert "{algorithms}" not in text
    for name, algorithm in algorithms.BY_NAME.items():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert all(hyperparameter in line for hyperparameter in algorithm.hyperparameters)
    assert "--algorithm aeasgd --set beta=0.5" in text
