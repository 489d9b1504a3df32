"""What a model holds besides the parameters that are trained: buffers, and parameters that the optimiser leaves alone.

In `finish()` the ranks agree on it: names, shapes and dtypes first, then the values where they differ.
"""

from __future__ import annotations

import numpy as np
import torch

from mpidl.errors import ArgumentError, MismatchError
from mpidl.mpi.agreement import disagreement
from mpidl.mpi.topology import Topology
from mpidl.optim import state, transport

_COUNTER = "num_batches_tracked"  # BatchNorm's: how many batches its statistics have seen
_WHAT = "agreeing on the model's state"


class ModelState:
    """A model's state besides the parameters that one optimiser trains.

    Buffers that are not in the `state_dict()` are caches of each rank's own, and are left alone.

    Args:
        model: the model.
        trained: the parameters that the optimiser trains.
        adding: whether each rank's batches are batches of their own, so that a rank's BatchNorm statistics weigh by its
            number of batches, and these numbers are added up; False: one step's batch is spread over all ranks.
    """

    def __init__(self, model: torch.nn.Module, trained: state.Named, *, adding: bool) -> None:
        self._model, self._adding = model, adding
        self._trained = {id(parameter) for _, parameter in trained}
        self._before = {name: int(counter) for name, counter in self._counters().items()}
        self._base: dict[
            str, int
        ] = {}  # what counters had counted on all ranks before they counted batches of this run

    def forget_counts(self) -> None:
        """Takes all batches that BatchNorm layers have counted for batches of this run."""
        self._before = dict.fromkeys(self._before, 0)

    def _counters(self) -> dict[str, torch.Tensor]:
        return {
            name: buffer
            for name, buffer in self._model.named_buffers()
            if name.rpartition(".")[2] == _COUNTER and buffer.numel() == 1
        }

    def untrained(self) -> dict[str, torch.Tensor]:
        """Returns the parameters that the optimiser does not train, by name."""
        return {f"parameter {name}": p for name, p in self._model.named_parameters() if id(p) not in self._trained}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns the buffers that are in the model's `state_dict()`, by name."""
        caches = state.caches_of(self._model)
        return {f"buffer {name}": b for name, b in self._model.named_buffers() if name not in caches}

    def average(self, ranks: Topology, tensors: dict[str, torch.Tensor], steps: int) -> MismatchError | None:
        """Makes tensors alike on all ranks, in place; a collective.

        A floating tensor becomes the mean, in which a rank weighs as much as the steps that it took, or as the batches
        that its BatchNorm layer has counted; such counts are added up. Other tensors are those of the rank that took
        most steps. A tensor whose bits are equal on all ranks keeps them.

        Args:
            ranks: who takes part.
            tensors: by name; alike in names, shapes and dtypes on all ranks, see `describe_difference`.
            steps: how many steps this rank took.

        Returns:
            An error, alike on all ranks, if a sparse tensor differs between ranks; no tensor has changed then.
        """
        counts = self._count(ranks, steps)
        differing = state.differing(ranks, {name: transport.checksum(t) for name, t in tensors.items()}, _WHAT)
        for name in differing:
            if transport.is_sparse(tensors[name]):
                return MismatchError(
                    f"finish: {name} is sparse and differs between ranks, and only dense tensors are averaged: give "
                    'every rank the same one, or keep each rank\'s own by buffers="local"'
                )
        newest = int(np.argmax(counts[""]))
        for name, tensor in tensors.items():
            layer, _, last = name.removeprefix("buffer ").rpartition(".")
            counter = f"{layer}.{_COUNTER}" if layer else _COUNTER
            if last == _COUNTER and counter in counts:
                transport.write(tensor, torch.tensor(self._base[counter] + sum(counts[counter])))
            elif name in differing and transport.is_mean(tensor):
                transport.mean(ranks, tensor, counts.get(counter, counts[""]), _WHAT)
            elif name in differing:
                transport.broadcast(ranks, [tensor], newest, _WHAT)
        return None

    def _count(self, ranks: Topology, steps: int) -> dict[str, list[int]]:
        """Returns how many batches of this run each rank's BatchNorm layers have seen, by counter; "": its steps.

        Where all ranks take the same steps, only the steps are returned, so that all ranks weigh alike.
        """
        counters = self._counters() if self._adding else {}
        now = [int(counter) for counter in counters.values()]
        before = [self._before.get(name, 0) for name in counters]
        before = [old if old <= new else 0 for old, new in zip(before, now, strict=True)]  # else someone has reset it
        seen = [new - old for old, new in zip(before, now, strict=True)]
        everyone = ranks.gather_words(np.array([steps, *seen, *before], np.int64), _WHAT)
        self._base = dict(zip(counters, everyone[:, 1 + len(seen) :].min(axis=0).tolist(), strict=True))
        return dict(zip(("", *counters), everyone[:, : 1 + len(seen)].T.tolist(), strict=True))


def describe_difference(ranks: Topology, tensors: dict[str, torch.Tensor], what: str) -> MismatchError | None:
    """Returns an error, alike on all ranks, if the ranks hold different tensors by name, shape or dtype; a collective.

    Args:
        ranks: who takes part.
        tensors: by name.
        what: the call, for messages.
    """
    mine = {name: _kind(tensor) for name, tensor in tensors.items()}
    found = state.differing(ranks, mine, what)
    for name, kinds in found.items():
        texts = [kind or "does not exist" for kind in kinds]
        advice = (
            "register a cache that each rank fills for itself with persistent=False, and it stays as it is"
            if name.startswith("buffer ")
            else "change a model's parameters alike on every rank"
        )
        return MismatchError(f"{what}: {name} differs between ranks: {disagreement(texts)}; {advice}")
    return None


def _kind(tensor: torch.Tensor) -> str:
    kind = f"{state.dtype_name(tensor)} of shape {list(tensor.shape)}"
    return kind if tensor.layout is torch.strided else f"{kind} ({str(tensor.layout).removeprefix('torch.')})"


def refuse_local_norms(model: torch.nn.Module) -> None:
    """Refuses a SyncBatchNorm layer that would normalise each rank's batch by itself.

    Raises:
        ArgumentError: there is such a layer, and torch.distributed has no process group.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            raise ArgumentError(
                f"module {name or 'model'} is a SyncBatchNorm, which without a process group of torch.distributed "
                "normalises by this rank's batch alone: use BatchNorm layers, whose statistics finish() averages "
                '(buffers="mean"), or GroupNorm'
            )
