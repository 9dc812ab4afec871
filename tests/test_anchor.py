"""The anchor is exact, costs what it says, and its file is whole or refused."""

import errno
import os
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from schedulefree import AdamWScheduleFree
from tiny import bert, equal, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import Adafactor

from hf_reset import AnchorStore, select_parameters
from hf_reset.anchor.optimizers.look import _Walk
from hf_reset.anchor.optimizers.put_back import _WayBack
from hf_reset.anchor.shards import unwrapped_optimizer
from hf_reset.errors import AnchorError, AnchorFileError, UnsupportedError


def step(model, optimizer, seed):
    """One optimizer step on random rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (4, 8), generator=generator)
    model(input_ids=ids, labels=torch.randint(0, 3, (4,), generator=generator)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def moments(optimizer, model):
    """Copies of the optimizer's state, by parameter name."""
    state = optimizer.state
    return {
        (name, key): value.clone() if isinstance(value, torch.Tensor) else value
        for name, p in model.named_parameters()
        for key, value in state.get(p, {}).items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def adamw(model, **more):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **more)


@pytest.fixture
def trained():
    """A model with two steps of AdamW behind it."""
    model = bert(dropout=0)
    optimizer = adamw(model)
    for seed in range(2):
        step(model, optimizer, seed)
    return model, optimizer


@pytest.mark.parametrize("storage", ["device", "cpu"])
@pytest.mark.parametrize("scope", ["all", "head", "last:1", r"\.bias$"])
def test_restore_is_exact_in_place_and_only_in_scope(trained, scope, storage):
    model, optimizer = trained
    anchor = AnchorStore(model, optimizer, scope=scope, storage=storage)
    before, moments_before = weights(model), moments(optimizer, model)
    pointers = [p.data_ptr() for p in model.parameters()]
    anchor.snapshot()
    step(model, optimizer, 5)
    moved, moments_moved = weights(model), moments(optimizer, model)
    assert not any(torch.equal(before[name], moved[name]) for name in before)
    anchor.restore()
    for name, p in model.named_parameters():
        inside = name in anchor.names
        assert torch.equal(p, (before if inside else moved)[name])
        for key in ("exp_avg", "exp_avg_sq", "step"):
            expected = (moments_before if inside else moments_moved)[name, key]
            assert torch.equal(optimizer.state[p][key], expected)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert anchor.names != list(before) or scope == "all"


def test_a_reset_makes_the_next_step_the_one_after_the_anchor(trained):
    model, optimizer = trained
    anchor = AnchorStore(model, optimizer)
    anchor.snapshot()
    step(model, optimizer, 5)
    first, first_moments = weights(model), moments(optimizer, model)
    step(model, optimizer, 6)
    anchor.restore()
    step(model, optimizer, 5)
    assert equal(weights(model), first)
    assert same(moments(optimizer, model), first_moments)


def test_optimizer_state_zero_is_as_if_fresh(trained):
    model, optimizer = trained
    anchor = AnchorStore(model, optimizer, optimizer_state="zero")
    anchor.snapshot()
    step(model, optimizer, 5)
    anchor.restore()
    assert all(not value.any() for value in moments(optimizer, model).values())
    step(model, optimizer, 6)
    fresh = bert(dropout=0)
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            p.copy_(anchor.tensors()[name])
    fresh_optimizer = adamw(fresh)
    step(fresh, fresh_optimizer, 6)
    assert equal(weights(model), weights(fresh))


def test_optimizer_state_keep(trained):
    model, optimizer = trained
    anchor = AnchorStore(model, optimizer, optimizer_state="keep")
    anchor.snapshot()
    step(model, optimizer, 5)
    kept = moments(optimizer, model)
    anchor.restore()
    assert same(moments(optimizer, model), kept)


def test_an_anchor_from_before_the_first_step_restores_fresh_optimizer_state():
    model = bert(dropout=0)
    optimizer = adamw(model)
    anchor = AnchorStore(model, optimizer)
    anchor.snapshot()
    step(model, optimizer, 5)
    first = weights(model)
    anchor.restore()
    step(model, optimizer, 5)
    assert equal(weights(model), first)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
        lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
        lambda m: adamw(m, amsgrad=True),
        lambda m: adamw(m, fused=True),
        lambda m: Adafactor(m.parameters(), lr=1e-2, relative_step=False, scale_parameter=False),
        lambda m: Adafactor(m.parameters(), scale_parameter=True, relative_step=True, warmup_init=True),
    ],
    ids=["sgd", "adagrad", "amsgrad", "fused", "adafactor", "adafactor-relative"],
)
def test_any_optimizer_continues_exactly_from_the_anchor(make):
    """Numbers among the state (Adafactor's `step` and `RMS`) go back as well."""
    model = bert(dropout=0)
    optimizer = make(model)
    step(model, optimizer, 1)
    anchor = AnchorStore(model, optimizer)
    anchor.snapshot()
    step(model, optimizer, 5)
    first = weights(model)
    step(model, optimizer, 6)
    anchor.restore()
    step(model, optimizer, 5)
    assert equal(weights(model), first)


@pytest.mark.parametrize("scope", ["all", "head"])
def test_nbytes_is_the_scope_and_its_optimizer_state(trained, scope):
    model, optimizer = trained
    size = sum(p.numel() * 4 for p in select_parameters(model, scope).values())
    count = len(AnchorStore(model, scope=scope).names)
    assert AnchorStore(model, scope=scope).nbytes == size
    for mode, expected in (("keep", size), ("zero", size), ("restore", 3 * size + 4 * count)):  # `step` is a float
        anchor = AnchorStore(model, optimizer, scope=scope, optimizer_state=mode)
        anchor.snapshot()
        assert anchor.nbytes == expected


def test_a_snapshot_reuses_its_memory_and_a_distance_is_euclidean(trained):
    model, optimizer = trained
    anchor = AnchorStore(model, optimizer)
    anchor.snapshot()
    held = anchor.tensors()
    pointers = {name: tensor.data_ptr() for name, tensor in held.items()}
    before = weights(model)
    assert anchor.distance() == 0
    step(model, optimizer, 5)
    expected = torch.cat([(p - before[name]).flatten() for name, p in model.named_parameters()]).double().norm()
    assert anchor.distance() == pytest.approx(expected.item(), rel=1e-5)
    anchor.snapshot()
    assert {name: tensor.data_ptr() for name, tensor in anchor.tensors().items()} == pointers
    assert anchor.distance() == 0


def test_swapped_is_a_visit(trained):
    model, optimizer = trained
    anchor = AnchorStore(model, optimizer)
    before = weights(model)
    anchor.snapshot()
    step(model, optimizer, 5)
    moved, kept = weights(model), moments(optimizer, model)
    with anchor.swapped():
        assert equal(weights(model), before)
        for verb in (anchor.snapshot, anchor.restore, lambda: anchor.save("x"), lambda: anchor.load("x")):
            with pytest.raises(AnchorError, match=r"inside `swapped\(\)`.*Leave the `with` block"):
                verb()
    assert equal(weights(model), moved)
    assert same(moments(optimizer, model), kept)
    assert equal(anchor.tensors(), before)
    with pytest.raises(RuntimeError, match="boom"), anchor.swapped():
        raise RuntimeError("boom")
    assert equal(weights(model), moved)


@pytest.mark.parametrize("verb", ["restore", "distance", "swapped", "tensors"])
def test_a_verb_before_any_snapshot_names_both(verb):
    anchor = AnchorStore(bert())
    with pytest.raises(AnchorError, match=r"came before any `snapshot`.*Call `snapshot\(\)` first"):
        getattr(anchor, verb)() if verb != "swapped" else anchor.swapped().__enter__()


def test_batch_norm_statistics_go_back_with_a_full_reset_only():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    for scope, moves_back in (("all", True), (["2"], False)):
        model = make()
        anchor = AnchorStore(model, scope=scope)
        anchor.snapshot()
        before = model[1].running_mean.clone()
        model(torch.randn(8, 3) + 5)
        assert not torch.equal(model[1].running_mean, before)
        anchor.restore()
        assert torch.equal(model[1].running_mean, before) is moves_back
        assert model[1].num_batches_tracked.item() == (0 if moves_back else 1)


def test_tied_weights_are_held_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    anchor = AnchorStore(model)
    anchor.snapshot()
    assert anchor.nbytes == 64
    before = model["a"].weight.detach().clone()
    with torch.no_grad():
        model["b"].weight.add_(1)
    anchor.restore()
    assert torch.equal(model["a"].weight, before)
    assert model["b"].weight is model["a"].weight


def test_half_precision_parameters():
    model = bert(dropout=0).to(torch.bfloat16)
    before = weights(model)
    anchor = AnchorStore(model)
    anchor.snapshot()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    anchor.restore()
    assert equal(weights(model), before)
    assert anchor.nbytes == sum(p.numel() * 2 for p in model.parameters())


# On disk


@pytest.mark.parametrize("storage", ["device", "cpu"])
def test_a_reloaded_anchor_equals_the_one_saved(trained, storage, tmp_path):
    model, optimizer = trained
    anchor = AnchorStore(model, optimizer)
    anchor.snapshot()
    before, moments_before = weights(model), moments(optimizer, model)
    anchor.save(tmp_path / "deep" / "anchor.safetensors", {"note": [1, 2.5]})
    step(model, optimizer, 5)
    other = AnchorStore(model, optimizer, storage=storage)
    assert other.load(tmp_path / "deep" / "anchor.safetensors") == {"note": [1, 2.5]}
    assert not equal(weights(model), before)
    other.restore()
    assert equal(weights(model), before)
    assert same(moments(optimizer, model), moments_before)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["anchor.safetensors"]


def test_loading_into_an_optimizer_without_state_makes_it(trained, tmp_path):
    model, optimizer = trained
    anchor = AnchorStore(model, optimizer)
    anchor.snapshot()
    anchor.save(tmp_path / "a")
    step(model, optimizer, 5)
    expected = weights(model)
    fresh = bert(dropout=0)
    fresh_optimizer = adamw(fresh)
    other = AnchorStore(fresh, fresh_optimizer)
    other.load(tmp_path / "a")
    other.restore()
    step(fresh, fresh_optimizer, 5)
    assert equal(weights(fresh), expected)


def test_loading_casts_to_the_live_dtype(trained, tmp_path):
    model, _ = trained
    anchor = AnchorStore(model)
    anchor.snapshot()
    anchor.save(tmp_path / "a")
    half = bert(dropout=0).to(torch.bfloat16)
    other = AnchorStore(half)
    other.load(tmp_path / "a")
    other.restore()
    assert equal(weights(half), {name: w.to(torch.bfloat16) for name, w in weights(model).items()})


def saved(tmp_path, **more):
    model = bert()
    anchor = AnchorStore(model, adamw(model), **more)
    anchor.snapshot()
    anchor.save(tmp_path / "anchor.safetensors")
    return tmp_path / "anchor.safetensors"


def test_a_truncated_file_is_refused(tmp_path):
    file = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AnchorFileError, match=r"anchor.safetensors' is truncated .*earlier, whole checkpoint"):
        AnchorStore(bert()).load(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(AnchorFileError, match=r"no anchor file .*none.safetensors'"):
        AnchorStore(bert()).load(tmp_path / "none.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(AnchorFileError, match=r"is not an anchor written by hf_reset"):
        AnchorStore(bert()).load(tmp_path / "model.safetensors")


def test_an_anchor_of_another_model_is_refused(tmp_path):
    file = saved(tmp_path)
    with pytest.raises(AnchorFileError, match=r"belongs to another model: .* has shape"):
        AnchorStore(bert(hidden_size=32)).load(file)
    with pytest.raises(AnchorFileError, match=r"belongs to another model: .* tensors are on one side only"):
        AnchorStore(bert(num_hidden_layers=1)).load(file)


def test_an_anchor_of_another_scope_is_refused(tmp_path):
    file = saved(tmp_path, scope="head")
    with pytest.raises(AnchorFileError, match="belongs to another scope: it was written for scope 'head'"):
        AnchorStore(bert()).load(file)


def test_an_anchor_without_the_optimizer_state_asked_for_is_refused(tmp_path):
    file = saved(tmp_path, optimizer_state="keep")
    model = bert()
    with pytest.raises(AnchorFileError, match='written with `optimizer_state="keep"`, this one is "restore"'):
        AnchorStore(model, adamw(model)).load(file)


def test_a_failed_write_leaves_the_last_anchor_and_no_litter(tmp_path, monkeypatch):
    file = saved(tmp_path)
    before = file.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(AnchorFileError, match=r"could not be written: .*No space left.*Free the disk"):
        saved(tmp_path)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["anchor.safetensors"]


def test_the_file_is_whole_at_any_moment_of_a_write(tmp_path):
    """A process that does nothing but overwrite its anchor is stopped at twelve moments, and killed."""
    file = tmp_path / "anchor.safetensors"
    code = (
        "import sys, torch\nfrom torch import nn\nfrom hf_reset import AnchorStore\n"
        "model = nn.Linear(600, 600)\nanchor = AnchorStore(model)\n"
        "while True:\n    anchor.snapshot(); anchor.save(sys.argv[1]); print('.', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
    process.stdout.readline()
    model = nn.Linear(600, 600)
    for moment in range(12):
        time.sleep(0.003 * moment)
        process.send_signal(signal.SIGSTOP)
        AnchorStore(model).load(file)
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    AnchorStore(model).load(file)


# Refusals


def test_schedule_free_optimizers_are_refused():
    model = bert()
    with pytest.raises(UnsupportedError, match=r"AdamWScheduleFree is schedule-free.*adamw_torch"):
        AnchorStore(model, AdamWScheduleFree(model.parameters()))


def test_tensor_parallel_weights_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
        with pytest.raises(UnsupportedError, match=r"'0.weight' is a DTensor outside FSDP2 \(tensor parallelism"):
            AnchorStore(model)
    finally:
        dist.destroy_process_group()


def test_accelerates_wrapper_is_looked_through(trained):
    _model, optimizer = trained
    assert unwrapped_optimizer(Accelerator(cpu=True).prepare(optimizer)) is optimizer


def test_peft_only_adapters_move():
    model = peft.get_peft_model(bert(dropout=0), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    anchor = AnchorStore(model, scope="adapters")
    anchor.snapshot()
    before = weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    anchor.restore()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is ("lora_" in name)


# The end under a partial scope


@pytest.mark.parametrize("storage", ["device", "cpu"])
def test_a_finish_brings_back_all_that_was_evaluated_with_a_partial_anchor(trained, storage, tmp_path):
    model, optimizer = trained
    anchor = AnchorStore(model, optimizer, scope="head", storage=storage, keep_rest=True)
    lean = AnchorStore(model, optimizer, scope="head", storage=storage)
    anchor.snapshot()
    lean.snapshot()
    rest = sum(p.numel() * 4 for name, p in model.named_parameters() if name not in anchor.names)
    assert anchor.nbytes == lean.nbytes + rest
    before, moments_before = weights(model), moments(optimizer, model)
    step(model, optimizer, 5)
    moved, moments_moved = weights(model), moments(optimizer, model)
    anchor.restore()  # a reset goes back in its scope only
    assert equal(weights(model), {name: (before if name in anchor.names else moved)[name] for name in moved})
    after_reset = weights(model)
    for one, all_of_it in ((anchor, True), (lean, False)):  # a visit brings all that is held, and takes it away again
        assert one.holds_all is all_of_it
        with one.swapped():
            assert equal(weights(model), before if all_of_it else after_reset)
        assert equal(weights(model), after_reset)
    anchor.save(tmp_path / "a")
    reloaded = AnchorStore(model, optimizer, scope="head", keep_rest=True)
    reloaded.load(tmp_path / "a")
    for one in (anchor, reloaded):
        step(model, optimizer, 6)
        assert one.finish()
        assert equal(weights(model), before)
    kept = moments(optimizer, model)
    assert all(torch.equal(kept[key], moments_before[key]) for key in kept if key[0] in anchor.names)
    assert not any(torch.equal(kept[key], moments_moved[key]) for key in kept if key[0] not in anchor.names)


def test_an_anchor_written_without_the_rest_still_loads_and_says_so_at_the_end(trained, tmp_path):
    model, optimizer = trained
    lean, anchor = (AnchorStore(model, optimizer, scope="head", keep_rest=keep) for keep in (False, True))
    lean.snapshot(), lean.save(tmp_path / "lean")
    anchor.snapshot(), anchor.save(tmp_path / "whole")
    anchor.load(tmp_path / "lean")
    assert not anchor.finish()
    lean.load(tmp_path / "whole")
    assert lean.nbytes < AnchorStore(model, optimizer, scope="head", keep_rest=True).nbytes
    assert not lean.finish()
    assert AnchorStore(model, optimizer, keep_rest=True).nbytes == AnchorStore(model, optimizer).nbytes


def test_batch_norm_statistics_belong_to_the_finish():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    anchor = AnchorStore(model, scope=["2"], keep_rest=True)
    anchor.snapshot()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(8, 3) + 5)
    anchor.restore()
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert anchor.finish()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# AdaLoRA


def test_adalora_is_refused_and_its_head_is_not():
    config = peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_r=4, target_r=2, total_step=20)
    model = peft.get_peft_model(bert(), config)
    for scope in ("all", "adapters", "peft"):
        with pytest.raises(UnsupportedError, match=r"AdaLoRA's weights .*lora_A.* are not supported.*Use `LoraConfig`"):
            AnchorStore(model, scope=scope)
    AnchorStore(model, scope="head")
    with pytest.raises(UnsupportedError, match=r"AdaLoRA"):
        AnchorStore(model, scope="head", keep_rest=True)


CHANGES = ["none", "replaced", "half precision", "other memory", "more", "fewer", "expanded", "no state", "renamed"]
CHANGES += ["another's", "shared"]


@pytest.mark.parametrize("scope", ["all", r"^[12]\."])
@pytest.mark.parametrize("change", [*CHANGES, "a view of a weight"])
def test_a_second_reset_puts_back_whatever_became_of_the_optimizers_state(change: str, scope: str) -> None:
    """What a look remembers of a state's arrangement must not be taken for what is there."""
    model, optimizer, step = _with_adam()
    anchor = AnchorStore(model, optimizer, scope=scope)
    for _ in range(2):  # what was learnt of one anchor must not outlive it
        step()
        anchor.snapshot()
        wanted = _states(model, optimizer, anchor)
        step()
        anchor.restore()
        step()
        _change(change, model, optimizer)
        weights = [one.detach().clone() for one in anchor.tensors().values()]
        anchor.restore()
        _assert_states(_states(model, optimizer, anchor), wanted)
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], w) for name, w in zip(anchor.names, weights, strict=True))


@pytest.mark.parametrize("scope", ["all", r"^[12]\."])
@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_takes_whatever_became_of_the_optimizers_state(change: str, scope: str) -> None:
    """Also where it stands no longer as the last one saw it."""
    model, optimizer, step = _with_adam()
    anchor = AnchorStore(model, optimizer, scope=scope)
    for _ in range(2):
        step()
        anchor.snapshot()
        anchor.restore()
    _change(change, model, optimizer)
    anchor.snapshot()
    wanted = _states(model, optimizer, anchor)
    for state in optimizer.state.values():
        for value in state.values():
            value.data = torch.full_like(value, 7)
    anchor.restore()
    _assert_states(_states(model, optimizer, anchor), wanted)


def test_a_state_that_stands_as_it_did_is_not_walked_again(monkeypatch) -> None:
    """Else small models pay more for a walk than for the copy."""
    model, optimizer, step = _with_adam()
    anchor = AnchorStore(model, optimizer)
    step()
    anchor.snapshot()
    walked = []
    see, put = _Walk.see, _WayBack.put
    monkeypatch.setattr(_Walk, "see", lambda self, value, at: walked.append(at) or see(self, value, at))
    monkeypatch.setattr(_WayBack, "put", lambda self, live, form, at: walked.append(at) or put(self, live, form, at))
    for _ in range(2):
        step()
        anchor.restore()
        step()
        anchor.snapshot()
    assert not [at for at in walked if at.name]
    _change("replaced", model, optimizer)
    anchor.restore()
    assert [at for at in walked if at.name]


def _with_adam():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        for p in model.parameters():
            p.grad = None if p is model[2].weight else torch.randn_like(p)  # which has no state, until "another's"
        optimizer.step()

    step()
    return model, optimizer, step


def _change(change: str, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    p: nn.Parameter = model[1].weight
    state = optimizer.state[p]
    if change == "replaced":
        state["exp_avg"] = torch.ones_like(p)
    elif change == "half precision":
        state["exp_avg"] = state["exp_avg"].half()
    elif change == "other memory":  # the same tensor for Python, as an engine that offloads it leaves it
        state["exp_avg"].data = state["exp_avg"].half()
    elif change == "expanded":  # from the same address, but all rows are one
        state["exp_avg"].data = state["exp_avg"][:1].expand_as(p)
    elif change == "more":
        state["extra"] = torch.ones(1)
    elif change == "fewer":
        del state["exp_avg_sq"]
    elif change == "no state":
        del optimizer.state[p]
    elif change == "renamed":
        optimizer.state[p] = {("mean" if key == "exp_avg" else key): value for key, value in state.items()}
    elif change == "shared":
        optimizer.state["shared"] = {"count": torch.ones(1)}
    elif change == "another's":
        optimizer.state[model[2].weight] = {"exp_avg": torch.ones(2, 2)}
    elif change == "a view of a weight":
        state["exp_avg"] = p.detach()


def _states(model: nn.Module, optimizer: torch.optim.Optimizer, anchor: AnchorStore) -> dict[str, dict[str, Tensor]]:
    """Copies of what is remembered of the parameters in scope, and with a full one of what is nobody's."""
    keys = {name: p for name, p in model.named_parameters() if name in anchor.names and p in optimizer.state}
    if anchor.is_full and "shared" in optimizer.state:
        keys["shared"] = "shared"
    return {name: {key: value.clone() for key, value in optimizer.state[p].items()} for name, p in keys.items()}


def _assert_states(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == wanted.keys()
    for name, state in wanted.items():
        assert found[name].keys() == state.keys()
        assert all(found[name][key].dtype == value.dtype for key, value in state.items())
        assert all(torch.equal(found[name][key], value) for key, value in state.items())
