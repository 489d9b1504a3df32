"""Weights that something else than the optimizer has written or changed: the exact result, or a refusal by name."""

from __future__ import annotations

import contextlib
import copy
import functools

import numpy as np
import pytest
import torch
from family_helpers import KINDS, OVERLAPPED, Bowl, center_of, in_turns, one_step, sgd, weight
from training_helpers import abandon, assert_alike

import mpidl

ANY_MPI = True
WITH_OTHERS = True
SIZES = (1, 3)
SERVERS = (0, 1)

SHARDED = {"sharded": functools.partial(mpidl.Synchronous, shard=True)}
AVERAGING = {"ModelAveraging": mpidl.ModelAveraging, "DiLoCo": mpidl.DiLoCo}
REFUSING = {**KINDS, **OVERLAPPED, "DiLoCo": mpidl.DiLoCo}
EVERY = {**KINDS, **OVERLAPPED, **AVERAGING, "Synchronous": mpidl.Synchronous, **SHARDED}
KEEPING = ("GEM", "DistBelief", "DistBelief overlapped", "DiLoCo")  # momenta or sums of the rule's own

START, LOADED = np.linspace(-1, 2, 300), np.linspace(3, 1, 300)


def made(name, comm, model, lr=0.1, **given):
    more = {} if name in (*SHARDED, "Synchronous") else {"communication_window": 2}
    return EVERY[name](sgd(model, lr), model, comm=comm, **{**more, **given})


def begun(name, comm, steps, lr=0.1, **given):
    model = Bowl(START, comm.rank)
    optimizer = made(name, comm, model, lr, **given)
    for _ in range(steps):
        one_step(model, optimizer)
    return model, optimizer


def load(model, values=LOADED):
    model.load_state_dict({"weight": torch.as_tensor(values)})


def by_data(model):
    model.weight.data.copy_(torch.as_tensor(LOADED))


def by_new_data(model):
    model.weight.data = torch.as_tensor(LOADED).clone()


def by_vector(model):
    torch.nn.utils.vector_to_parameters(torch.as_tensor(LOADED).clone(), model.parameters())


def by_clamping(model):
    with torch.no_grad():
        model.weight.clamp_(max=LOADED.max()).clamp_(min=0.5)


def by_one_element(model):
    with torch.no_grad():
        model.weight[7] = 0


WRITES = (by_clamping, load, by_data, by_new_data, by_vector, by_one_element)


def refused(call, what="parameter weight was written outside a step.*broadcast_parameters.*register_step_post_hook"):
    with pytest.raises(mpidl.ArgumentError, match=what):
        call()


def closes(optimizer, model):
    """Starts anew and finishes; returns the weights that this rank had when it did the first."""
    optimizer.broadcast_parameters()
    written = weight(model)
    optimizer.finish()
    return written


# ------------------------------------------------------------------------------------------------- writes are noticed


@pytest.mark.parametrize("name", REFUSING)
def test_a_write_is_refused_by_the_next_step_by_the_center_and_by_finish(comm, name):
    model, optimizer = begun(name, comm, 0)
    for write in WRITES:
        write(model)
        refused(optimizer.center if hasattr(optimizer, "center") else optimizer.averaged)
        refused(lambda: one_step(model, optimizer))
        optimizer.broadcast_parameters()
        assert np.array_equal(weight(model), comm.broadcast(weight(model).copy())), write
        one_step(model, optimizer)
    load(model)
    refused(optimizer.finish)
    assert np.array_equal(closes(optimizer, model), LOADED)
    assert np.array_equal(weight(model), LOADED)  # nothing was committed since


@pytest.mark.parametrize("name", [*KINDS, "DiLoCo"])
def test_a_write_on_one_rank_is_refused_by_all_in_finish(comm, name):
    model, optimizer = begun(name, comm, 1)
    if comm.rank == comm.size - 1:
        load(model)
    error = (mpidl.ArgumentError, mpidl.MismatchError)
    with pytest.raises(error, match="parameter weight was written outside a step"):
        optimizer.finish()
    before = comm.broadcast(weight(model).copy())
    assert np.array_equal(closes(optimizer, model), before)
    assert_alike(comm, model)


def test_without_a_write_nothing_changes_when_an_average_was_there_for_an_evaluation(comm):
    """An average of the weights is copied in and out between two steps, in place or by other memory."""
    if comm.size > 1:
        return

    def in_place(model, other):
        with torch.no_grad():
            model.weight.copy_(other)

    def by_data_in_place(model, other):
        model.weight.data.copy_(other)

    def by_memory(model, other):
        model.weight.data = other.clone()

    for name in EVERY:
        found = []
        for put in (None, in_place, by_data_in_place, by_memory):
            if name in SHARDED and put is not None:
                continue
            model, optimizer = begun(name, comm, 0)
            for _ in range(5):
                one_step(model, optimizer)
                if put is not None:
                    kept = model.weight.detach().clone()
                    put(model, kept / 2)
                    put(model, kept)
            optimizer.finish()
            found.append(weight(model))
        assert all(np.array_equal(each, found[0]) for each in found), name


@pytest.mark.parametrize("name", ["ModelAveraging", "Synchronous"])
def test_the_same_write_on_all_ranks_is_followed_where_no_center_is(comm, name):
    for number, write in enumerate(WRITES):
        model, optimizer = begun(name, comm, number % 3, lr=0.0)
        write(model)
        expected = weight(model)
        for _ in range(number):
            one_step(model, optimizer)
        optimizer.finish()
        np.testing.assert_allclose(weight(model), expected, rtol=1e-15, atol=0)
        assert_alike(comm, model)


def test_clamping_after_each_step_is_followed_by_model_averaging(comm):
    """In the mean of projected weights every rank has its own, as it would have by a step hook."""
    found = []
    for by_hook in (False, True):
        model, optimizer = begun("ModelAveraging", comm, 0)
        if by_hook:
            optimizer.register_step_post_hook(lambda *_, model=model: by_clamping(model))
        for step in range(5):
            one_step(model, optimizer)
            if not by_hook and step % 2 == 0:  # after a round the mean is inside already
                by_clamping(model)
        optimizer.finish()
        found.append(weight(model))
    if comm.size == 1:
        assert found[0].min() >= 0.5
    assert np.abs(found[1]).max() < 4


def test_model_averaging_refuses_a_write_that_is_not_alike_on_all_ranks(comm):
    if comm.size == 1:
        return

    def only_one(rank):
        return lambda model: load(model) if comm.rank == rank else None

    def by_seed(model):
        load(model, LOADED + comm.rank)

    for write in (only_one(0), only_one(1), by_seed):
        model, optimizer = begun("ModelAveraging", comm, 0)
        write(model)
        one_step(model, optimizer)
        with pytest.raises(mpidl.MismatchError, match=r"not alike on all ranks.*broadcast_parameters"):
            one_step(model, optimizer)
        closes(optimizer, model)
        assert_alike(comm, model)


def test_bytes_of_a_narrower_dtype_and_of_other_orders_in_memory_are_compared(comm):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(4, 8, 3, bias=False).to(dtype).to(memory_format=torch.channels_last)
        optimizer = mpidl.AGN(sgd(model), model, comm=comm)
        model.weight.data.mul_(2)
        with pytest.raises(mpidl.ArgumentError, match="weight was written"):
            optimizer.step()
        expected = comm.broadcast(model.weight.detach().float().clone())
        optimizer.broadcast_parameters()
        assert torch.equal(optimizer.center()[1]["weight"].float(), expected)
        optimizer.finish()
        assert torch.equal(model.weight.float(), expected)


# ------------------------------------------------------------------------------------------------ starting anew


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_starts_anew_is_one_that_started_there_bit_for_bit(comm, name):
    starts_anew(comm, name)


@pytest.mark.usefixtures("protocol")
def test_the_center_starts_anew_however_it_is_held(world_comm):
    for name in ("Downpour", "Downpour overlapped", "ADAG", "DistBelief"):
        starts_anew(world_comm, name)


def starts_anew(comm, name):
    """Ranks go in turns. Before, a rank has a step that no other has seen, or an exchange that is under way."""
    exact = comm.size == 1 or "overlapped" not in name  # threads of several workers come in any order
    together = name in (*SHARDED, *AVERAGING, "Synchronous")  # ranks wait for each other
    turns = free_steps if together else in_turns
    fresh = Bowl(LOADED, comm.rank)
    expected = made(name, comm, fresh)
    turns(comm, fresh, expected, 5)

    model = Bowl(START, comm.rank)
    optimizer = made(name, comm, model)
    if name not in KEEPING:
        turns(comm, model, optimizer, 3)
        if not together:
            optimizer.statistics.staleness.clear()
    load(model) if comm.rank == 0 or name in SHARDED else None
    optimizer.broadcast_parameters()
    assert np.array_equal(weight(model), LOADED)
    if not together:
        assert np.array_equal(center_of(optimizer), LOADED)
        comm.barrier()
    turns(comm, model, optimizer, 5)
    assert np.array_equal(weight(model), weight(fresh)) or not exact
    if not together and exact:
        assert np.array_equal(center_of(optimizer), center_of(expected))
        assert optimizer.statistics.staleness == expected.statistics.staleness
    comm.barrier()
    for each in (expected, optimizer):
        each.finish()
    assert_alike(comm, model)


def free_steps(comm, model, optimizer, steps):
    for _ in range(steps):
        one_step(model, optimizer)


def test_buffers_and_frozen_parameters_start_anew_too_and_optimizer_state_is_kept(comm):
    for name, kind in EVERY.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        model[0].bias.requires_grad_(False)
        momentum = 0.9 if name in ("EAMSGD", "GEM") else 0.0
        plain = name in ("DCASGD", "GEM", "EAMSGD") or name.startswith("DistBelief")
        inner = sgd(model, momentum=momentum) if plain else torch.optim.Adam(model.parameters())
        optimizer = kind(inner, model, comm=comm)
        model(torch.randn(5, 3) + comm.rank).sum().backward()
        optimizer.step()
        with torch.no_grad():
            model[0].bias += comm.rank + 1
        state = copy.deepcopy(inner.state_dict()["state"])
        first = {key: comm.broadcast(value.detach().clone()) for key, value in model.state_dict().items()}
        optimizer.broadcast_parameters()
        for key, value in model.state_dict().items():
            assert torch.equal(value, first[key]), (name, key)
        assert str(state) == str(inner.state_dict()["state"])
        optimizer.finish()


def test_workers_that_wait_for_each_other_start_anew_wherever_they_are(comm):
    """With a bound on clocks a worker waits for slower ones; those that have come to start anew hold up no one."""
    for spread in (0, 1):
        model = Bowl(START, comm.rank)
        optimizer = mpidl.Downpour(sgd(model), model, communication_window=1, max_clock_spread=spread, comm=comm)
        for part in range(3):
            for _ in range(1 + (comm.rank + part) % comm.size):
                one_step(model, optimizer)
            load(model, LOADED + comm.rank)
            optimizer.broadcast_parameters()
            assert np.array_equal(weight(model), LOADED)
        one_step(model, optimizer)
        optimizer.finish()
        assert_alike(comm, model)


def test_a_warm_start_begins_from_the_loaded_weights(comm):
    model = Bowl(START, 0)
    optimizer = mpidl.DistBelief(sgd(model), model, warm_start=2, gamma=1e-9, comm=comm)
    load(model)
    optimizer.broadcast_parameters()
    for _ in range(3):
        one_step(model, optimizer)
    optimizer.finish()
    np.testing.assert_allclose(weight(model), LOADED, atol=1e-6)


def test_a_replay_goes_through_it(comm, tmp_path_factory, monkeypatch):
    from mpidl.parameter_server.worker import replay

    folder = comm.broadcast(np.frombuffer(str(tmp_path_factory.mktemp("log")).ljust(200).encode(), np.uint8).copy())
    monkeypatch.setenv("MPIDL_REPLAY", folder.tobytes().decode().strip() + "/log")
    found = []
    for _ in range(2):
        monkeypatch.setattr(replay, "_made", 0)
        model, optimizer = begun("Downpour", comm, 3)
        load(model)
        optimizer.broadcast_parameters()
        for _ in range(3):
            one_step(model, optimizer)
        optimizer.finish()
        found.append(weight(model))
        comm.barrier()
    assert np.array_equal(*found)


@pytest.mark.parametrize("name", [*KINDS, *AVERAGING, "Synchronous", "sharded"])
def test_after_finish_it_is_refused(comm, name):
    model, optimizer = begun(name, comm, 0)
    optimizer.finish()
    with pytest.raises(mpidl.ClosedError, match="broadcast_parameters"):
        optimizer.broadcast_parameters()
    load(model)  # the weights are the user's again


def test_a_rank_in_finish_starts_anew_with_the_others(comm):
    for name in ("Synchronous", "sharded"):
        model, optimizer = begun(name, comm, 1)
        if comm.rank < max(1, comm.size - 1):
            load(model)
            optimizer.broadcast_parameters()
        expected = LOADED
        optimizer.finish()
        assert np.array_equal(weight(model), expected), name


# ---------------------------------------------------------------------------------------- sharded weights, one memory


def test_sharded_weights_that_every_rank_loads_are_refused_or_start_anew(comm):
    model, optimizer = begun("sharded", comm, 2)
    load(model)
    with pytest.raises(mpidl.ArgumentError, match=r"weight was written in place.*broadcast_parameters"):
        optimizer.step()
    optimizer.broadcast_parameters()
    assert np.array_equal(weight(model), LOADED)
    fresh = Bowl(LOADED, comm.rank)
    expected = made("Synchronous", comm, fresh)
    for each, stepped in ((model, optimizer), (fresh, expected)):
        one_step(each, stepped)
        stepped.finish()
    assert np.array_equal(weight(model), weight(fresh))


# ------------------------------------------------------------------------------------------ a step of the wrapped one


def test_a_step_of_the_wrapped_optimizer_by_itself_is_refused(comm):
    for name in EVERY:
        model, optimizer = begun(name, comm, 1)
        before = weight(model)
        inner = optimizer._inner
        model().backward()
        with pytest.raises(mpidl.ArgumentError, match=r"call step\(\) of"):
            inner.step()
        assert np.array_equal(weight(model), before), name
        optimizer.zero_grad()
        one_step(model, optimizer)
        optimizer.finish()
        if name not in SHARDED:
            inner.step()


# ------------------------------------------------------------------------------------------- projections in step hooks


def test_a_projection_in_a_step_hook_belongs_to_the_step(comm):
    """One worker: the same bits as torch alone, for rules that leave one worker plain SGD."""
    plain = ("Downpour", "Downpour overlapped", "DynSGD", "ADAG", "DCASGD", "ModelAveraging", "Synchronous")
    given = {"DiLoCo": {"outer_lr": 1.0, "outer_momentum": 0.0}}
    for name in (*EVERY,):
        if name.startswith("DistBelief") or name in SHARDED:
            continue
        model = Bowl(START, 5)
        optimizer = made(name, comm, model, **given.get(name, {}))
        alone = Bowl(START, 5)
        expected = sgd(alone)
        optimizer.register_step_post_hook(lambda *_, model=model: by_clamping(model))
        expected.register_step_post_hook(lambda *_, alone=alone: by_clamping(alone))
        for _ in range(5):
            one_step(model, optimizer)
            one_step(alone, expected)
        optimizer.finish()
        if comm.size == 1 and (name in plain or name in given):
            assert np.array_equal(weight(model), weight(alone)), name
        assert_alike(comm, model)


def test_distbelief_refuses_a_projection_since_its_center_gets_gradients(comm):
    model = Bowl(START, 5)
    optimizer = made("DistBelief", comm, model)
    handle = optimizer.register_step_post_hook(lambda *_: by_clamping(model))
    with pytest.raises(mpidl.ArgumentError, match=r"parameter weight was written in a step hook.*DistBelief"):
        one_step(model, optimizer)
    handle.remove()
    optimizer.broadcast_parameters()
    optimizer.finish()


class TwoSets(torch.optim.SGD):
    """Steps with one set of weights and shows another, as Schedule-Free does."""

    def eval(self):
        self._switch(2.0)

    def train(self):
        self._switch(0.5)

    @torch.no_grad()
    def _switch(self, factor):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(factor)


def test_an_optimizer_with_two_sets_of_weights_switches_them(comm):
    for kind in (mpidl.Downpour, mpidl.ModelAveraging, mpidl.DiLoCo, mpidl.AEASGD):
        found = []
        for switches in (False, True):
            model = Bowl(START, 0)
            optimizer = kind(TwoSets(model.parameters(), lr=0.1), model, comm=comm)
            for _ in range(3):
                one_step(model, optimizer)
                if switches:
                    optimizer.eval()
                    optimizer.train()
            optimizer.finish()
            found.append(weight(model))
        if comm.size == 1:
            assert np.array_equal(*found)


# ------------------------------------------------------------------------------------------------ the model changes


@contextlib.contextmanager
def of_other_memory(model):
    kept = model.weight.data
    model.weight.data = kept[:5]
    yield "weight has changed; expected torch.float64 of shape \\(300,\\)"
    model.weight.data = kept


@contextlib.contextmanager
def grown(model):
    kept = model.weight.data
    model.weight.data = torch.cat([kept, kept])
    yield "weight has changed; expected torch.float64 of shape"
    model.weight.data = kept


@contextlib.contextmanager
def cast(model):
    kept = model.weight.data
    model.bfloat16()
    yield "weight has changed; expected torch.float64"
    model.weight.data = kept


@contextlib.contextmanager
def replaced(model):
    kept = model.weight
    model.weight = torch.nn.Parameter(kept.detach().clone())
    yield "weight was replaced"
    model.weight = kept


@contextlib.contextmanager
def assigned(model):
    kept = model.weight
    model.load_state_dict({"weight": torch.as_tensor(LOADED).clone()}, assign=True)
    yield "weight was replaced"
    model.weight = kept


CHANGES = (of_other_memory, grown, cast, replaced, assigned)


@pytest.mark.parametrize("name", [*KINDS, *AVERAGING])
def test_a_parameter_that_is_another_one_is_refused_by_name(comm, name):
    model, optimizer = begun(name, comm, 1)
    for change in CHANGES:
        with change(model) as said:
            refused(optimizer.step, said)
            refused(optimizer.broadcast_parameters, said)
            if change is not grown:
                refused(optimizer.finish, said)
        optimizer.broadcast_parameters()
        one_step(model, optimizer)
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3)))
    refused(optimizer.step, "parameters in param_groups are no longer")
    optimizer.param_groups[0]["params"].pop()
    one_step(model, optimizer)
    optimizer.finish()
    assert_alike(comm, model)


def test_a_change_on_one_rank_is_told_by_all_in_a_round_and_in_finish(comm):
    if comm.size == 1:
        return
    for name in ("DiLoCo", "ModelAveraging", "AGN"):
        model, optimizer = begun(name, comm, 1)
        change = of_other_memory(model) if comm.rank == 1 else contextlib.nullcontext()
        with change, pytest.raises((mpidl.ArgumentError, mpidl.MismatchError), match="parameter weight has changed"):
            optimizer.finish() if name == "AGN" else optimizer.step()
        optimizer.broadcast_parameters()
        optimizer.finish()
        assert_alike(comm, model)


def test_parameters_that_are_frozen_later_or_move_in_memory_are_followed(comm):
    for name in (*KINDS, *AVERAGING):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)).double()
        optimizer = made(name, comm, model)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
            optimizer.step()
            if step == 1:
                model[0].requires_grad_(False)
                model.share_memory()
                torch.nn.utils.parametrize.register_parametrization(model[1], "weight", torch.nn.Identity())
        optimizer.finish()
        assert_alike(comm, model)


def test_an_abandoned_refusal_does_not_keep_the_inner_optimizer(comm):
    """The hook that refuses steps of the wrapped optimizer goes with the mpidl optimizer."""
    model, optimizer = begun("Synchronous", comm, 0)
    inner = optimizer._inner
    optimizer.finish()
    again = mpidl.AGN(inner, model, comm=comm)
    model().backward()
    again.step()
    abandon(again)
    again.finish()
