"""Trains by Lightning and by skorch, which always step with a closure, with a wrapped optimiser; run by mpirun.

Every rank has its own part of the data. The sums of all ranks' parameters are compared with a plain loop on all data.
"""

from __future__ import annotations

import logging
import sys
import warnings

import torch

import mpidl

STEPS = 4
comm = mpidl.world()


def net() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def data(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(STEPS * 6, 4, generator=torch.Generator().manual_seed(rank))
    return x, x.sum(1, keepdim=True).sin()


def plain() -> torch.nn.Module:
    """The same steps in one process, on the samples of all ranks."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = [data(rank) for rank in range(comm.size)]
    for step in range(STEPS):
        here = slice(6 * step, 6 * step + 6)
        x, y = (torch.cat([part[i][here] for part in parts]) for i in (0, 1))
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
    return model


def wrapped(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return getattr(mpidl, kind)(inner, model, **({"communication_window": 2} if kind == "AGN" else {}))


def with_lightning(kind: str, automatic: bool) -> torch.nn.Module:
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = net(), automatic

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            loss = ((self.net(batch[0]) - batch[1]) ** 2).mean()
            if not automatic:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.optimizer = wrapped(self.net, kind)
            return self.optimizer

    module = Module()
    trainer = pytorch_lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(comm.rank)), batch_size=6)
    trainer.fit(module, loader)
    assert module.optimizer.statistics.steps == STEPS
    module.optimizer.finish()
    return module.net


def with_skorch(kind: str) -> torch.nn.Module:
    import skorch

    class Regressor(skorch.NeuralNetRegressor):
        def initialize_optimizer(self, *_: object, **__: object) -> Regressor:
            self.optimizer_ = wrapped(self.module_, kind)
            return self

    x, y = data(comm.rank)
    trained = Regressor(
        net(), max_epochs=1, batch_size=6, train_split=None, iterator_train__shuffle=False, verbose=0
    ).fit(x.numpy(), y.numpy())
    assert trained.optimizer_.statistics.steps == STEPS
    trained.optimizer_.finish()
    return trained.module_


def check(what: str, model: torch.nn.Module, exact: bool) -> None:
    for ours, theirs in zip(model.parameters(), plain().parameters(), strict=True):
        everyone = comm.allgather(ours.detach())
        assert everyone.eq(everyone[0]).all(), what
        assert not exact or torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), what
    if comm.rank == 0:
        print(f"{what}: trained", flush=True)


logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.simplefilter("ignore")
for chosen in ("Synchronous", "AGN"):
    if "lightning" in sys.argv:
        for automatic in (True, False):
            what = f"Lightning {'automatic' if automatic else 'manual'} {chosen}"
            check(what, with_lightning(chosen, automatic), exact=chosen == "Synchronous")
    if "skorch" in sys.argv:
        check(f"skorch {chosen}", with_skorch(chosen), exact=chosen == "Synchronous")
