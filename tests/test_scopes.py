"""Which parameters a scope selects, on real architectures."""

import peft
import pytest
import torch
from tiny import bert
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForQuestionAnswering,
)

from hf_reset import select_parameters
from hf_reset.anchor.scopes import batch_norm_buffers, covers_all
from hf_reset.errors import ScopeError

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama(tied=False, cls=LlamaForCausalLM):
    return cls(LlamaConfig(**LLAMA, tie_word_embeddings=tied))


def lora(model, **more):
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **more}))


def names(model, scope):
    return list(select_parameters(model, scope))


def test_all_is_every_trainable_parameter_in_model_order():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    selected = select_parameters(model, "all")
    assert list(selected) == expected
    assert all(selected[name] is p for name, p in model.named_parameters() if name in selected)
    assert covers_all(model, selected)
    assert not covers_all(model, select_parameters(model, "head"))


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (bert, {"classifier"}),
        (lambda: llama(cls=LlamaForSequenceClassification), {"score"}),
        (llama, {"lm_head"}),
        (
            lambda: DistilBertForSequenceClassification(
                DistilBertConfig(vocab_size=40, dim=16, hidden_dim=32, n_layers=2, n_heads=2)
            ),
            {"pre_classifier", "classifier"},
        ),
    ],
)
def test_head_is_what_lies_outside_the_base_model(model, head):
    assert {name.split(".")[0] for name in names(model(), "head")} == head


def test_last_blocks_and_the_head():
    chosen = names(llama(), "last:2")
    assert {".".join(name.split(".")[:3]) for name in chosen} == {"model.layers.1", "model.layers.2", "lm_head.weight"}
    assert names(bert(), "last:1")[-2:] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("scope", [r"classifier", ["classifier"], ["classifier.weight", "classifier.bias"]])
def test_regular_expression_and_list_forms(scope):
    assert names(bert(), scope) == ["classifier.weight", "classifier.bias"]


def test_a_list_item_is_a_suffix_that_begins_at_a_dot():
    assert names(bert(), ["pooler.dense"]) == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    with pytest.raises(ScopeError, match=r"`scope` names 'ooler.dense'.*Close names: "):
        names(bert(), ["ooler.dense"])


def test_adapters_of_lora_and_modules_to_save_is_head():
    model = lora(llama(cls=LlamaForSequenceClassification), task_type="SEQ_CLS")
    adapters, head = names(model, "adapters"), names(model, "head")
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert head == ["base_model.model.score.modules_to_save.default.weight"]
    assert set(adapters) | set(head) == set(names(model, "all"))


def classifiers():
    """PEFT classifiers whose head is trained as a copy (`modules_to_save`), by method."""
    base = llama(cls=LlamaForSequenceClassification)
    yield "lora", lora(base, task_type="SEQ_CLS", bias="all", trainable_token_indices={"embed_tokens": [1, 2]})
    base = llama(cls=LlamaForSequenceClassification)
    yield "ia3", peft.get_peft_model(base, peft.IA3Config("SEQ_CLS", target_modules=["q_proj"], feedforward_modules=[]))
    base = llama(cls=LlamaForSequenceClassification)
    yield "prompt", peft.get_peft_model(base, peft.PromptTuningConfig("SEQ_CLS", num_virtual_tokens=3))


@pytest.mark.parametrize(
    ("method", "model"), list(classifiers()), ids=lambda value: value if str(value) == value else ""
)
def test_peft_is_adapters_and_the_trained_head(method, model):
    chosen = names(model, "peft")
    assert set(chosen) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in chosen)
    assert not any("modules_to_save" in name for name in names(model, "adapters"))
    assert covers_all(model, select_parameters(model, "peft"))
    model.get_base_model().model.norm.requires_grad_(True)  # unfrozen by hand: not PEFT's
    assert names(model, "peft") == chosen
    assert not covers_all(model, select_parameters(model, "peft"))


def test_peft_takes_the_classifier_of_xlora(tmp_path):
    for name in ("a", "b"):
        lora(llama()).save_pretrained(tmp_path / name)
    base = llama()
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, adapters={name: str(tmp_path / name) for name in ("a", "b")}
    )
    model = peft.get_peft_model(base, config)
    chosen = names(model, "peft")
    assert any("internal_xlora_classifier" in name for name in chosen)
    assert set(chosen) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_peft_needs_a_peft_model():
    with pytest.raises(ScopeError, match=r'`scope` "peft" needs a PEFT model'):
        names(bert(), "peft")


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
        peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
        peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
        peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
        peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_of_any_peft_method_are_all_that_it_trains(config):
    model = peft.get_peft_model(llama(), config)
    assert names(model, "adapters") == names(model, "all")


def test_adapters_leaves_out_what_was_unfrozen_by_hand():
    model = lora(llama())
    model.get_base_model().model.norm.requires_grad_(True)
    assert not any("norm" in name for name in names(model, "adapters"))


def test_a_trained_bias_of_the_base_is_adapter_and_one_of_modules_to_save_is_head():
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS"))
    adapters = names(model, "adapters")
    assert "base_model.model.bert.pooler.dense.bias" in adapters
    assert not any("modules_to_save" in name for name in adapters)


def test_only_the_active_adapter_is_selected():
    model = lora(llama())
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    assert all(".second." in name for name in names(model, "adapters"))


def test_last_blocks_of_a_peft_model_are_the_adapters_in_them():
    chosen = names(lora(llama()), "last:1")
    assert chosen
    assert all("layers.2." in name and "lora_" in name for name in chosen)


def test_ddp_and_compile_wrappers_are_looked_through():
    model = bert()
    assert names(torch.compile(model, backend="eager"), "head") == names(model, "head")
    assert names(nn.DataParallel(model), "head") == names(model, "head")


def test_batch_norm_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    assert batch_norm_buffers(model) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def frozen():
    model = bert()
    model.requires_grad_(False)
    return model


def frozen_head():
    model = bert()
    model.classifier.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "scope", "message"),
    [
        (bert, "clasifier", "`scope` 'clasifier' selects nothing on BertForSequenceClassification. Its trainable"),
        (bert, ["clasifier.weight"], "`scope` names 'clasifier.weight'.* Close names: classifier.weight"),
        (bert, ".*", 'selects every parameter of BertForSequenceClassification. If that is meant, say "all"'),
        (bert, ["bert", "classifier"], 'selects every parameter .* say "all"'),
        (bert, "adapters", '"adapters" needs a PEFT model, and BertForSequenceClassification has no adapter. Wrap'),
        (bert, "last:3", "asks for 3 blocks of the 2 .* K must be between 1 and 2"),
        (frozen, "all", "selects nothing: BertForSequenceClassification has no trainable parameter. Unfreeze"),
        (frozen_head, "head", "selects 2 parameters .* all of them are frozen. Unfreeze some"),
        (lambda: nn.Linear(2, 2), "last:1", "needs a stack of blocks .* and Linear has none"),
        (lambda: nn.Linear(2, 2), "head", "cannot be told apart on Linear"),
        (
            lambda: T5ForQuestionAnswering(
                T5Config(vocab_size=40, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8)
            ),
            "head",
            "cannot be told apart on T5ForQuestionAnswering.* the head would be everything",
        ),
        (lambda: llama(tied=True), "head", "tied to the input embeddings 'model.embed_tokens.weight'.* regular"),
        (lambda: llama(tied=True), "last:1", "tied to the input embeddings"),
        (lambda: llama(tied=True), "lm_head", "'lm_head.weight', which is tied to 'model.embed_tokens.weight'"),
        (lambda: llama(tied=True), ["lm_head"], "'lm_head.weight', which is tied to 'model.embed_tokens.weight'"),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)),
            "head",
            "tied to the input embeddings 'transformer.wte.weight'",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(model, scope, message):
    with pytest.raises(ScopeError, match=message):
        select_parameters(model(), scope)
