"""Whatever an optimizer remembers, wherever it keeps it, goes back with a reset, or is refused before training."""

import importlib.util
import json
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import toy_optimizers as toys
from exactness import BEFORE, CASES, EXCURSION, PROOFS, RESULTS, Case, Net, Run, outcome
from tiny import TRAIN, VALIDATION, arguments, bert, weights
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from hf_reset import AnchorStore, ResetTrainer, ResetTrainingArguments
from hf_reset.anchor.optimizers.look import look
from hf_reset.anchor.optimizers.memory import from_header, to_header
from hf_reset.anchor.optimizers.reach import Place, Reach, escaped, unescaped
from hf_reset.errors import AnchorError, AnchorFileError, UnsupportedError


def toy(cls, *more):
    return Case(
        "toy", cls.__name__ + "".join(f"({one.__name__})" for one in more), lambda m: cls(m.parameters(), *more)
    )


TOYS = [
    *map(toy, (toys.NumbersInGroups, toys.ObjectsInState, toys.NestedState, toys.StateInGroups, toys.Attributes)),
    *map(toy, (toys.OwnTheta, toys.FromTheStart, toys.TensorsOfTensors, toys.NeedsGradients)),
    toy(toys.OnePerParameter, toys.ObjectsInState),
    toy(toys.OnePerParameter, toys.NumbersInGroups),
    Case("toy", "SlowWeights(Adam)", lambda m: toys.SlowWeights(torch.optim.Adam(m.parameters(), lr=1e-3))),
]


@pytest.mark.parametrize("case", [*TOYS, *CASES], ids=lambda case: case.id)
def test_the_steps_after_a_reset_are_those_after_the_anchor(case):
    """Weights bit for bit, over twelve steps; a table in the README says the same of every optimizer."""
    if importlib.util.find_spec(case.package) is None and case.package != "toy":
        pytest.skip(f"{case.package} is not installed; `recipes/results/exactness.json` has the proof for {case.name}")
    if case.is_slow:
        pytest.skip(f"{case.name} takes minutes; `recipes/results/exactness.json` has the proof")
    with warnings.catch_warnings():
        if case.package != "toy":
            warnings.simplefilter("ignore")  # of the package's own making
        found = {name: outcome(proof, case) for name, proof in PROOFS.items()}
    if case.package == "toy":
        expected = dict.fromkeys(PROOFS, "exact")
        if "Slow" in case.name:
            expected["zero"] = found["zero"]
            assert "whose `slow of embedding.weight` begins as a copy of the weights" in found["zero"]
    else:
        expected = {name: RECORDS[case.id][name] for name in PROOFS}
    assert found == expected


RECORDS = {
    f"{record['package']}-{record['name']}": record
    for record in json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]
}


def test_the_result_file_has_every_optimizer():
    """`python tests/exactness.py` writes it."""
    assert list(RECORDS) == [case.id for case in CASES]
    for record in RECORDS.values():
        assert all(record[name] == "exact" or record[name].startswith("refused: ") for name in PROOFS)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (
            toys.HiddenInAClosure,
            "HiddenInAClosure remembers something that a reset cannot put back: rehearsed on a twin",
        ),
        (toys.HiddenInAModule, "HiddenInAModule remembers something that a reset cannot put back: rehearsed on a twin"),
        (
            toys.HoldsAnIterator,
            "HoldsAnIterator keeps a builtins.list_iterator in `self.rates`, which cannot be copied",
        ),
        (toys.SetsItsRate, "SetsItsRate sets `lr` in its own step"),
    ],
)
def test_what_cannot_be_exact_is_refused_before_training(cls, words):
    model = bert()
    before = weights(model)
    with pytest.raises(
        UnsupportedError, match=f'Optimizer {words}.*Choose another `optim`, or `optimizer_state="keep"`'
    ):
        AnchorStore(model, cls(model.parameters()))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    AnchorStore(model, cls(model.parameters()), optimizer_state="keep").snapshot()


def test_a_rehearsal_leaves_no_trace():
    """Weights, optimizer and every random generator stand as before, so that the run is the one without it."""
    model = Net()
    optimizer = toys.Attributes(model.parameters())
    reach = Reach(dict(model.named_parameters()), {}, full=True)
    draws = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: E731
    before, tensors = draws(), {place: t.clone() for place, t in look(optimizer, reach).tensors.items()}
    form = to_header(look(optimizer, reach).form)
    AnchorStore(model, optimizer)
    assert draws() == before
    assert to_header(look(optimizer, reach).form) == form
    assert all(torch.equal(tensors[place], t) for place, t in look(optimizer, reach).tensors.items())
    assert all(p.grad is None for p in model.parameters())


def test_what_the_schedule_and_the_user_own_goes_on():
    """OneCycle moves the rate and the betas; a user moves weight decay: a reset leaves all of them."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    anchor = AnchorStore(model, optimizer)
    anchor.snapshot()
    for step in range(5):
        nn.functional.cross_entropy(model(torch.tensor([[step]])), torch.tensor([0])).backward()
        optimizer.step()
        schedule.step()
        optimizer.param_groups[0]["weight_decay"] = 0.1 * step
    now = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    anchor.restore()
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == now
    assert not optimizer.state
    assert now["weight_decay"] == 0.4
    assert now["betas"] != (0.95, 0.999)


def test_a_partial_reset_leaves_what_the_group_shares():
    """The one rule: a full reset takes a group's numbers along, a partial one leaves them."""
    run = Run(toy(toys.NumbersInGroups))
    part, full = AnchorStore(run.model, run.optimizer, scope="^head"), AnchorStore(run.model, run.optimizer)
    run.steps(BEFORE)
    group = run.optimizer.param_groups[0]
    then = (group["step"], group["d"].clone(), group["warm"])
    part.snapshot()
    full.snapshot()
    run.steps(EXCURSION)
    now = (group["step"], group["d"].clone(), group["warm"])
    part.restore()
    assert (group["step"], group["d"], group["warm"]) == now
    full.restore()
    assert (group["step"], group["d"], group["warm"]) == then != now


def test_bytes_are_those_of_all_tensors_it_remembers():
    run = Run(toy(toys.ObjectsInState)).steps(range(1))
    anchor = AnchorStore(run.model, run.optimizer)
    each = sum(p.nbytes for p in run.model.parameters())
    assert anchor.nbytes == 2 * each  # the weights, and a basis of each
    anchor.snapshot()
    assert anchor.nbytes == 2 * each
    assert AnchorStore(run.model, run.optimizer, scope="^head").nbytes == 2 * sum(
        p.nbytes for p in run.model.head.parameters()
    )


def test_a_snapshot_keeps_no_tensor_alive_that_the_optimizer_lets_go_of():
    run = Run(toy(toys.ObjectsInState)).steps(range(1))
    anchor = AnchorStore(run.model, run.optimizer)
    anchor.snapshot()
    old = weakref.ref(run.optimizer.state[run.model.head.bias]["projector"].basis.matrix)
    run.steps(range(3, 9))
    assert old() is None


def test_a_file_needs_the_objects_that_the_optimizer_makes(tmp_path):
    """They are not made from a file, which would be running what it says."""
    run = Run(toy(toys.ObjectsInState)).steps(BEFORE)
    anchor = AnchorStore(run.model, run.optimizer)
    anchor.snapshot()
    anchor.save(tmp_path / "anchor")
    fresh = Run(toy(toys.ObjectsInState))
    reread = AnchorStore(fresh.model, fresh.optimizer)
    reread.load(tmp_path / "anchor")
    with pytest.raises(AnchorError, match=r"ObjectsInState has not made its `projector of .*` yet.*or take a step"):
        reread.restore()
    fresh.steps(range(1))
    reread.restore()
    reference = Run(toy(toys.ObjectsInState)).steps(BEFORE)
    for name, p in fresh.model.named_parameters():
        assert torch.equal(p, reference.model.get_parameter(name))


def test_zero_without_a_file_must_know_what_fresh_was():
    """A run resumed before its first anchor: Adam is known to begin with nothing, others are not."""
    run = Run(toy(torch.optim.AdamW)).steps(BEFORE)
    anchor = AnchorStore(run.model, run.optimizer, optimizer_state="zero")
    anchor.refuse_unknown_fresh()
    anchor.snapshot()
    anchor.restore()
    assert not run.optimizer.state
    run = Run(toy(toys.FromTheStart)).steps(BEFORE)
    with pytest.raises(UnsupportedError, match=r'`optimizer_state="zero"` cannot go on .* FromTheStart was when fresh'):
        AnchorStore(run.model, run.optimizer, optimizer_state="zero").refuse_unknown_fresh()


@pytest.mark.parametrize("name", ["plain", "a:b/c%d", "@weight", "#1", "$", "!0", ""])
def test_names_come_back_from_places(name):
    assert unescaped(escaped(name)) == name
    assert not set(escaped(name)) & set(":/")
    assert escaped(name)[:1] not in tuple("@#$&!")


def test_keys_of_every_kind_come_back():
    model = nn.Linear(2, 2)
    reach = Reach(dict(model.named_parameters()), {}, full=True)
    at = Place("self:table", "")
    for key in ("a:b", "weight", "@weight", 3, -1.5, True, None, float("inf"), (1, "a"), model.weight, id(model.bias)):
        back = reach.key(reach.token(key, 0, at), at)
        assert back is key or back == key
    assert reach.step(reach.token(model.weight, 0, at), at) == ("self:table", "weight")
    assert reach.step(reach.token("weight", 0, at), at) == ("self:table", "weight")
    assert reach.step(reach.token("weight", 0, Place("param_groups:0", "")), Place("param_groups:0", "")).name == ""


def test_a_header_keeps_every_plain_value():
    form = [
        "dict",
        {"a": ["value", 1 + 2j], "b": ["value", b"\x00"], "c": ["value", float("inf")], "d": ["value", None]},
    ]
    assert from_header("file", {"optimizer": to_header(form)}).form == form
    with pytest.raises(AnchorFileError, match="'file' is damaged: its header has no readable 'optimizer'"):
        from_header("file", {"optimizer": "{"})


def test_a_run_with_trainer_resumes_exactly(tmp_path):
    """Numbers in the groups and objects in the state, in a checkpoint and out of it again."""

    def run(folder, **more):
        model = bert()
        optimizer = toys.NumbersInGroups(model.parameters(), lr=0.02)
        settings = {"reset_probability": 0.5, "reset_patience": 0, "save_strategy": "steps", "save_steps": 3}
        trainer = ResetTrainer(
            model,
            arguments(folder, ResetTrainingArguments, **settings),
            train_dataset=TRAIN,
            eval_dataset=VALIDATION,
            optimizers=(optimizer, None),
        )
        trainer.train(**more)
        return trainer

    whole = run(tmp_path / "whole")
    assert [event["kind"] for event in whole.reset_callback.events].count("reset") > 1
    again = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert again.reset_callback.events == whole.reset_callback.events


def test_a_step_is_not_skipped_where_the_optimizer_fails_without_gradients(tmp_path):
    """`ResetTrainer` skips forward and backward of a step that a reset discards; the optimizer still steps."""
    model = bert()
    trainer = ResetTrainer(
        model,
        arguments(tmp_path, ResetTrainingArguments, reset_probability=0.5, reset_patience=0),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        optimizers=(toys.NeedsGradients(model.parameters()), None),
    )
    trainer.train()
    assert trainer.reset_callback.store.needs_gradients
    assert [event["kind"] for event in trainer.reset_callback.events].count("reset") > 1
    for optimizer in (torch.optim.AdamW(model.parameters()), toys.NumbersInGroups(model.parameters())):
        assert not AnchorStore(model, optimizer).needs_gradients
