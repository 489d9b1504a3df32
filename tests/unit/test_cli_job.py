"""What a job file may be: how it is loaded, which mistakes are refused and by which name. No MPI."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mpidl.errors import ArgumentError
from mpidl.training import job as jobs
from mpidl.training.data import first_batch

GOOD = """
import argparse
import torch
from torch.utils.data import TensorDataset

options = argparse.Namespace()

def add_options(parser):
    parser.add_argument("--width", type=int, default=3)

def model():
    return torch.nn.Sequential(torch.nn.Linear(2, options.width), torch.nn.BatchNorm1d(options.width),
                               torch.nn.Dropout(0.5), torch.nn.Linear(options.width, 1))

def loss(model, batch):
    x, y = batch
    return ((model(x)[:, 0] - y) ** 2).mean()

def data(train):
    x = torch.arange(20.0).reshape(10, 2)
    return TensorDataset(x, x.sum(1))
"""


def write(folder: Path, text: str, name: str = "job.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture(autouse=True)
def restore_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_options_reach_the_functions(tmp_path: Path) -> None:
    job = jobs.load(write(tmp_path, GOOD), ["--width", "5"])
    assert job.options == {"width": 5}
    assert job.new_model()[0].out_features == 5
    assert jobs.load(write(tmp_path, GOOD)).new_model()[0].out_features == 3


def test_a_job_without_an_optimizer_gets_sgd(tmp_path: Path) -> None:
    job = jobs.load(write(tmp_path, GOOD))
    optimizer = job.new_optimizer(job.new_model().parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.05, 0.9)
    assert job.accuracy is None


def test_a_module_beside_the_job_can_be_imported(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 4\n", "helper_of_a_job.py")
    job = jobs.load(write(tmp_path, GOOD.replace("import argparse\n", "import argparse\nimport helper_of_a_job\n")))
    assert job.file.name == "job.py"


def test_a_job_may_define_dataclasses(tmp_path: Path) -> None:
    prefix = (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass C:\n    x: int = 1\n"
    )
    assert jobs.load(write(tmp_path, prefix + GOOD)).options == {"width": 3}


def test_trying_a_batch_changes_neither_buffers_nor_random_state(tmp_path: Path) -> None:
    job = jobs.load(write(tmp_path, GOOD))
    model, dataset = job.new_model(), job.dataset(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    job.try_batches(model, first_batch(dataset, 4), first_batch(dataset, 4))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("missing", ["model", "loss", "data"])
def test_a_missing_function_is_named(tmp_path: Path, missing: str) -> None:
    file = write(tmp_path, GOOD.replace(f"def {missing}(", f"def other_{missing}("))
    with pytest.raises(ArgumentError, match=rf"job\.py has no function {missing}\(\)"):
        jobs.load(file)


def test_what_is_not_a_function_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"accuracy of .* must be a function, found int"):
        jobs.load(write(tmp_path, GOOD + "accuracy = 3\n"))


def test_a_function_with_other_arguments_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"loss\(\) of .* must take 2 positional arguments"):
        jobs.load(write(tmp_path, GOOD.replace("def loss(model, batch):", "def loss(model, batch, weight):")))


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("(model(batch[0])[:, 0] - batch[1]) ** 2", r"a tensor of shape \(4,\)"),
        ("float(model(batch[0]).sum())", "float"),
        ("torch.tensor(3)", "int64"),
        ("None", "NoneType"),
        ("torch.tensor(3.0)", "depends on no parameter"),
        ("model(batch[0]).detach().mean()", "depends on no parameter"),
    ],
)
def test_a_loss_that_is_not_a_scalar_with_a_gradient_is_refused(tmp_path: Path, expression: str, found: str) -> None:
    text = GOOD.partition("def loss")[0] + f"def loss(model, batch):\n    return {expression}\n"
    job = jobs.load(write(tmp_path, text + "def data" + GOOD.partition("def data")[2]))
    batch = first_batch(job.dataset(True), 4)
    with pytest.raises(ArgumentError, match=rf"(?s)loss\(model, batch\) of .*{found}"):
        job.try_batches(job.new_model(), batch, batch)


def test_an_accuracy_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    job = jobs.load(write(tmp_path, GOOD + "def accuracy(model, batch):\n    return model(batch[0])\n"))
    batch = first_batch(job.dataset(True), 4)
    with pytest.raises(ArgumentError, match=r"accuracy\(model, batch\) of .* one number, found a tensor of shape"):
        job.try_batches(job.new_model(), batch, batch)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return TensorDataset(x, x.sum(1))", "return iter(x)", r"data\(train=True\) .* Dataset with a length"),
        ("return TensorDataset(x, x.sum(1))", "return TensorDataset(x[:0])", "no samples"),
    ],
)
def test_data_without_samples_are_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    job = jobs.load(write(tmp_path, GOOD.replace(old, new)))
    with pytest.raises(ArgumentError, match=says):
        job.dataset(True)


def test_a_model_and_an_optimizer_of_another_kind_are_refused(tmp_path: Path) -> None:
    text = GOOD.replace("def model():", "def model():\n    return 3\ndef unused():")
    job = jobs.load(write(tmp_path, text + "def optimizer(parameters):\n    return list(parameters)\n"))
    with pytest.raises(ArgumentError, match=r"model\(\) of .* must return a torch.nn.Module, found int"):
        job.new_model()
    with pytest.raises(ArgumentError, match=r"must return a torch.optim.Optimizer, found list"):
        job.new_optimizer([torch.nn.Parameter(torch.ones(1))])


def test_wrong_options_are_refused_with_their_name(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    with pytest.raises(ArgumentError, match="--height"):
        jobs.load(file, ["--height", "3"])
    with pytest.raises(ArgumentError, match="--width"):
        jobs.load(file, ["--width", "broad"])


def test_help_of_the_job_s_own_options(tmp_path: Path) -> None:
    with pytest.raises(jobs.HelpAskedError) as asked:
        jobs.load(write(tmp_path, GOOD), ["--help"])
    assert asked.value.code == 0
    assert "--width" in asked.value.text


def test_a_file_that_is_none_or_no_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no job file"):
        jobs.load(tmp_path / "nowhere.py")
    with pytest.raises(ArgumentError, match=r"must end in \.py"):
        jobs.load(write(tmp_path, GOOD, "job.txt"))
