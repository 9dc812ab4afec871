"""Resetting adapters alone, and the anchor as an ordinary PEFT adapter directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_reset import AnchorStore, ResetTrainer, ResetTrainingArguments
from hf_reset.anchor.adapters import CONFIG, WEIGHTS, load_adapter_anchor, save_adapter_anchor
from hf_reset.errors import AnchorError, AnchorFileError, ConfigError, ScopeError

# peft 0.21 asks transformers 5.23 for an attribute that it renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

CASES = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
IDS = torch.arange(12).view(2, 6)


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )


def lora(**options):
    return LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules="all-linear", **{"r": 2, **options})


def adapted(**options):
    torch.manual_seed(1)
    return get_peft_model(base(), lora(**options))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def scramble(model, seed):
    """Move every trainable parameter, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def logits(model):
    was_training = model.training
    with torch.no_grad():
        result = model.eval()(input_ids=IDS).logits
    model.train(was_training)
    return result


@every_case
def test_the_directory_loads_without_this_package(options, tmp_path):
    model = adapted(**options)
    scramble(model, 2)
    store = AnchorStore(model, scope="adapters" if "modules_to_save" not in options else "all")
    store.snapshot()
    at_anchor, anchored = logits(model), values(model)
    scramble(model, 3)
    before = values(model)
    folder = save_adapter_anchor(store, model, tmp_path / "adapter")
    assert {entry.name for entry in folder.iterdir()} == {WEIGHTS, CONFIG}  # and no temporary left
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    loaded = PeftModel.from_pretrained(base(), folder)
    torch.testing.assert_close(logits(loaded), at_anchor, rtol=0, atol=0)
    for name, value in values(loaded).items():
        assert torch.equal(value, anchored[name])


def test_a_process_without_this_package_reads_it(tmp_path):
    model = adapted()
    scramble(model, 2)
    store = AnchorStore(model, scope="adapters")
    store.snapshot()
    base().save_pretrained(tmp_path / "base")
    save_adapter_anchor(store, model, tmp_path / "adapter")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "torch.save(model(input_ids=torch.arange(12).view(2, 6)).logits.detach(), sys.argv[3])\n"
        "assert not any(name.startswith('hf_reset') for name in sys.modules)"
    )
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))


@pytest.mark.parametrize("keep_rest", [False, True])
def test_modules_to_save_outside_the_scope_go_in_live_or_as_they_were_evaluated(tmp_path, keep_rest):
    model = adapted(modules_to_save=["lm_head"])
    store = AnchorStore(model, scope="adapters", keep_rest=keep_rest)
    store.snapshot()
    anchored = values(model)
    scramble(model, 3)
    live = values(model)
    loaded = values(PeftModel.from_pretrained(base(), save_adapter_anchor(store, model, tmp_path)))
    assert torch.equal(
        loaded["base_model.model.lm_head.modules_to_save.default.weight"],
        (anchored if keep_rest else live)["base_model.model.lm_head.modules_to_save.default.weight"],
    )
    adapters = [name for name in loaded if "lora_" in name]
    assert all(torch.equal(loaded[name], anchored[name]) for name in adapters)


@every_case
def test_reading_makes_it_the_anchor_and_touches_nothing_live(options, tmp_path):
    source = adapted(**options)
    scramble(source, 5)
    store = AnchorStore(source, scope="adapters")
    store.snapshot()
    wanted = values(source)
    save_adapter_anchor(store, source, tmp_path)

    model = adapted(**options)
    scramble(model, 6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    live = values(model)
    filled = AnchorStore(model, optimizer, scope="adapters")
    load_adapter_anchor(filled, model, tmp_path)
    assert all(torch.equal(value, live[name]) for name, value in values(model).items())
    filled.restore()
    for name, value in values(model).items():
        expected = wanted if name in filled.names else live
        assert torch.equal(value, expected[name]), name
    assert any("lora_A" in name for name in filled.names)


def test_of_several_adapters_the_active_one_is_reset_and_saved(tmp_path):
    model = adapted()
    model.add_adapter("second", lora(r=3))
    model.set_adapter("second")
    store = AnchorStore(model, scope="adapters")
    assert all(".second." in name for name in store.names)
    store.snapshot()
    anchored = values(model)
    with torch.no_grad():  # all adapters, the inactive one too
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 1.0
    save_adapter_anchor(store, model, tmp_path)
    store.restore()
    for name, value in values(model).items():
        assert torch.equal(value, anchored[name]) == (".default." not in name)
    loaded = PeftModel.from_pretrained(base(), tmp_path, adapter_name="second")
    assert all(torch.equal(value, anchored[name]) for name, value in values(loaded).items())


@every_case
def test_a_reset_moves_adapter_tensors_alone(options):
    model = adapted(**options)
    store = AnchorStore(model, scope="adapters")
    store.snapshot()
    anchored = values(model)
    with torch.no_grad():
        for parameter in model.parameters():  # the base too, which no training would move
            parameter += 0.5
    moved = values(model)
    buffers = [buffer.clone() for buffer in model.buffers()]
    store.restore()
    for name, value in values(model).items():
        is_adapter = "lora_" in name
        assert torch.equal(value, anchored[name] if is_adapter else moved[name]), name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


@every_case
@pytest.mark.parametrize("optimizer_state", ["restore", "keep"])
def test_anchor_bytes_are_adapter_bytes_and_their_optimizer_state(options, optimizer_state):
    model = adapted(**options)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    store = AnchorStore(model, optimizer, scope="adapters", optimizer_state=optimizer_state)
    store.snapshot()
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    weights = sum(p.nbytes for p in adapters)
    state = sum(value.nbytes for p in adapters for value in optimizer.state[p].values())
    assert store.nbytes == weights + (state if optimizer_state == "restore" else 0)


@every_case
def test_merging_after_training_gives_the_anchors_merged_weights(options, tmp_path):
    model = adapted(**options)
    frozen = {name: value for name, value in values(model).items() if not model.get_parameter(name).requires_grad}
    rows = Dataset.from_dict({"input_ids": IDS.tolist() * 4, "labels": IDS.tolist() * 4})
    args = ResetTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        reset_scope="all" if "modules_to_save" in options else "adapters",
        reset_probability=0.3,
        reset_patience=0,
    )
    trainer = ResetTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows.select([0]))
    trainer.train()
    assert trainer.reset_callback.reset_state.resets > 0
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    folder = save_adapter_anchor(trainer.reset_callback.store, model, tmp_path / "adapter")
    ours = model.merge_and_unload().state_dict()
    theirs = PeftModel.from_pretrained(base(), folder).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


def test_writing_over_another_adapter_never_mixes_the_two(tmp_path, monkeypatch):
    """Killed between its two renames, the directory has no weights rather than those of another configuration."""
    small, large = adapted(r=2), adapted(r=4)
    stores = [AnchorStore(model, scope="adapters") for model in (small, large)]
    for store in stores:
        store.snapshot()
    save_adapter_anchor(stores[0], small, tmp_path)
    replace = os.replace

    def dies_after_the_first(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        save_adapter_anchor(stores[1], large, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 4
    assert not (tmp_path / WEIGHTS).exists()


def test_refusals(tmp_path):
    model = adapted()
    store = AnchorStore(model, scope="adapters")
    with pytest.raises(AnchorError, match=r"before it is taken. Call `snapshot` first"):
        save_adapter_anchor(store, model, tmp_path / "a")
    store.snapshot()
    with pytest.raises(ConfigError, match=r"`adapter` is 'other', and the model has default"):
        save_adapter_anchor(store, model, tmp_path / "a", adapter="other")
    with pytest.raises(ConfigError, match=r"`model` is LlamaForCausalLM, not a PEFT model"):
        save_adapter_anchor(store, base(), tmp_path / "a")
    with pytest.raises(ScopeError):
        AnchorStore(base(), scope="adapters")
    with pytest.raises(AnchorFileError, match=r"cannot be read"):
        load_adapter_anchor(store, model, tmp_path / "absent")
    save_adapter_anchor(store, model, tmp_path / "a")
    wider = adapted(r=4)
    with pytest.raises(AnchorFileError, match=r"does not fit adapter 'default' of this model: 28 tensors differ"):
        load_adapter_anchor(AnchorStore(wider, scope="adapters"), wider, tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).write_bytes((tmp_path / "a" / WEIGHTS).read_bytes()[:100])
    with pytest.raises(AnchorFileError, match=r"cannot be read"):
        load_adapter_anchor(store, model, tmp_path / "a")
