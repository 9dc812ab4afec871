"""ResetTrainer: steps skipped where that changes nothing else, figures in the logs, and TRL."""

import math
from dataclasses import dataclass

import peft
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TRAIN, VALIDATION, Recorder, arguments, bert, callback, equal, reset_run, steps_of, weights
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor, AdafactorSchedule

from hf_reset import (
    ResetArguments,
    ResetConfig,
    ResetTrainer,
    ResetTrainerMixin,
    ResetTrainingArguments,
    StochasticResetCallback,
)
from hf_reset.corpora import train_tokenizer
from hf_reset.errors import ConfigError, MetricError
from hf_reset.training.trainer import PRIVATE_HOOKS

RESET = {"reset_probability": 0.4, "reset_patience": 0}


def count_forwards(model):
    """Forward passes of training, micro-batch by micro-batch."""
    counted = []
    model.register_forward_hook(lambda module, *_: counted.append(module.training))
    return lambda: sum(counted)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_forward_and_backward_are_skipped_on_a_discarded_step(tmp_path, accumulation):
    model = bert()
    forwards = count_forwards(model)
    trainer, _ = reset_run(
        tmp_path,
        model=model,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
        **RESET,
    )
    resets = len(steps_of(trainer.reset_callback.events, "reset"))
    assert resets > 2
    assert forwards() == (15 - resets) * accumulation


@pytest.mark.parametrize(
    "settings", [{"reset_scope": "head"}, {"reset_optimizer_state": "keep"}, {"reset_probability": 0.0}]
)
def test_no_step_is_skipped_whose_gradients_matter(tmp_path, settings):
    model = bert()
    forwards = count_forwards(model)
    reset_run(tmp_path, model=model, **{**RESET, **settings})
    assert forwards() == 15


def test_a_skipped_step_leaves_the_model_in_training_mode(tmp_path):
    class Modes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            modes.append(kwargs["model"].training)

    modes = []
    trainer, _ = reset_run(tmp_path, callbacks=[Modes()], eval_steps=1, **RESET)
    assert steps_of(trainer.reset_callback.events, "reset")
    assert modes == [True] * 15


def test_no_step_is_skipped_of_adafactor_that_sets_its_own_rate(tmp_path):
    """Its schedule asks the gradients whether there is a rate yet, and would log 0."""
    trainer, _ = reset_run(tmp_path, train=False, reset_probability=0.5, reset_patience=0, logging_steps=1)
    optimizer = Adafactor(trainer.model.parameters(), lr=None, relative_step=True, warmup_init=True)
    trainer.optimizer, trainer.lr_scheduler = optimizer, AdafactorSchedule(optimizer)
    trainer.train()
    assert trainer.reset_callback.reset_state.resets > 2
    rates = [record["learning_rate"] for record in trainer.state.log_history if "learning_rate" in record]
    assert len(rates) == 15
    assert min(rates[1:]) > 0, "the first is from before the first step"


def test_no_step_is_skipped_under_a_gradient_scaler(tmp_path):
    """A scaler that saw no gradients would raise. Whether one is active is read at each step, so it can be set."""
    model = bert()
    forwards = count_forwards(model)
    trainer, _ = reset_run(tmp_path, model=model, train=False, **RESET)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.train()
    assert len(steps_of(trainer.reset_callback.events, "reset")) > 2
    assert forwards() == 15


@pytest.mark.parametrize(("every", "accumulation"), [(1, 1), (5, 1), (1, 2), (5, 2)])
def test_the_logged_loss_of_a_skipped_step_is_never_zero(tmp_path, every, accumulation):
    trainer, _ = reset_run(
        tmp_path,
        logging_steps=every,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
        average_tokens_across_devices=False,
        **RESET,
    )
    assert len(steps_of(trainer.reset_callback.events, "reset")) > 2
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert len(losses) == 15 // every
    # Three random classes: a mean cross-entropy near log 3, in every window and whatever the accumulation. (For a
    # model whose forward takes **kwargs, Trainer logs the sum over micro-batches: one mean each.)
    assert all(abs(loss / accumulation - math.log(3)) < 0.2 for loss in losses)


def test_a_skipped_step_repeats_the_last_loss_however_often_it_is_logged_and_after_a_resume(tmp_path):
    def run(folder, every, resume=None):
        trainer, _ = reset_run(tmp_path / folder, logging_steps=every, resume=resume, **saving, **RESET)
        history = trainer.state.log_history
        return trainer, [h["loss"] for h in history if "loss" in h], history[-1]["train_loss"]

    saving = {"save_strategy": "no"}
    trainer, each, mean = run("each", 1)
    resets = steps_of(trainer.reset_callback.events, "reset")
    assert resets
    assert all(each[step] == each[step - 1] for step in resets)
    assert mean == pytest.approx(sum(each) / 15)
    step = next(step for step in resets if 4 <= step <= 7)
    saving = {"save_strategy": "steps", "save_steps": step}
    _, seldom, again = run("seldom", step)
    assert seldom == pytest.approx([sum(each[i : i + step]) / step for i in range(0, 15 - step + 1, step)])
    assert again == pytest.approx(mean)
    _, resumed, _ = run("seldom", step, resume=str(tmp_path / "seldom" / f"checkpoint-{step}"))
    assert resumed == seldom


def test_without_an_anchor_the_logs_are_the_plain_trainers(tmp_path):
    trainer, _ = reset_run(tmp_path, reset_probability=0.0, reset_finish="last")
    assert not any(key.startswith("reset/") for record in trainer.state.log_history for key in record)


def test_reset_figures_are_logged_and_reach_the_reporters(tmp_path):
    class Reporter(TrainerCallback):
        """Sees what TensorBoard and W&B see."""

        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append({"at": state.global_step, **logs})

    reporter = Reporter()
    trainer, _ = reset_run(tmp_path, callbacks=[reporter], **RESET)
    events = trainer.reset_callback.events
    logs = {log["at"]: log for log in reporter.seen if "loss" in log}
    assert "reset/anchor_step" not in logs[3]  # logged before the first evaluation
    for step, log in logs.items():
        resets = [e for e in events if e["kind"] == "reset" and e["step"] < step]
        assert log["reset/count"] == len(resets)
        if step > 3:
            anchor = [e for e in events if e["kind"] == "anchor" and e["step"] < step][-1]
            assert (log["reset/anchor_step"], log["reset/anchor_metric"]) == (anchor["step"], anchor["metric"])
        if resets:
            assert log["reset/steps_since"] == step - 1 - resets[-1]["step"]
            assert log["reset/distance"] == resets[-1]["distance"]
    assert "reset/count" in reporter.seen[-1]  # and in the summary at the end


def test_tensorboard_has_the_figures(tmp_path):
    reset_run(tmp_path, report_to="tensorboard", **RESET)
    (run,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    assert any(tag.endswith("reset/count") for tag in accumulator.Tags()["scalars"])


def test_the_configuration_comes_from_arguments_callback_or_defaults(tmp_path):
    def make(cls=TrainingArguments, callbacks=(), **more):
        return ResetTrainer(
            bert(),
            arguments(tmp_path, cls, **more),
            train_dataset=TRAIN,
            eval_dataset=VALIDATION,
            callbacks=list(callbacks),
        )

    assert make(ResetTrainingArguments, reset_probability=0.2).reset_callback.config.probability == 0.2
    given = callback(probability=0.3)
    assert make(callbacks=[given]).reset_callback is given
    plain = make()
    plain.train()
    assert plain.reset_callback.config == StochasticResetCallback().config
    with pytest.raises(ConfigError, match="`callbacks` has a StochasticResetCallback and `args` has `reset_"):
        make(ResetTrainingArguments, callbacks=[callback()])


def test_a_robust_loss_by_its_name(tmp_path):
    """GCE with q = 1 is 1 − p_y: what is logged and what chooses anchors is that, and not the cross-entropy."""
    trainer, _ = reset_run(tmp_path, reset_loss="gce", reset_loss_options='{"q": 1.0}', **RESET)
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    losses += [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    assert all(abs(loss - 2 / 3) < 0.1 for loss in losses)  # three classes, near chance
    with pytest.raises(ConfigError, match="loss 'gce' takes no alpha; it takes"):
        reset_run(tmp_path, reset_loss="gce", reset_loss_options='{"alpha": 1.0}', train=False, **RESET)


def test_the_private_hooks_are_those_on_the_list():
    """What is overridden beyond Trainer's public methods is on one list, and Trainer still has all of it."""
    from transformers import Trainer

    ours = {name for base in ResetTrainerMixin.__mro__[:-1] for name in vars(base)}
    overridden = {name for name in ours if name.startswith("_") and hasattr(Trainer, name)}
    assert {name for name in overridden if not name.startswith("__")} == set(PRIVATE_HOOKS)


# Habits


def test_fields_that_are_set_after_construction_take_effect(tmp_path):
    trainer, _ = reset_run(tmp_path, train=False, reset_probability=0.0, reset_patience=0)
    trainer.args.reset_probability = 1.0
    trainer.args.reset_loss, trainer.args.reset_loss_options = "gce", '{"q": 1.0}'
    trainer.train()
    assert steps_of(trainer.reset_callback.events, "reset") == list(range(3, 15))
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert all(abs(loss - 2 / 3) < 0.1 for loss in losses)  # 1 − p of three classes, near chance


def test_the_first_of_several_evaluation_sets_chooses_where_nobody_said_which(tmp_path, caplog):
    def run(folder, sets, **more):
        args = arguments(folder, ResetTrainingArguments, save_strategy="steps", save_steps=3, **{**RESET, **more})
        return ResetTrainer(bert(), args, train_dataset=TRAIN, eval_dataset=sets)

    sets = {"one": VALIDATION, "two": TRAIN}
    trainer = run(tmp_path / "sets", sets)
    trainer.train()
    alone = run(tmp_path / "alone", sets, reset_metric="one_loss")
    alone.train()
    assert trainer.reset_callback.reset_state.best == alone.reset_callback.reset_state.best
    assert equal(weights(trainer.model), weights(alone.model))
    assert "first one's 'eval_one_loss' chooses" in caplog.text
    again = run(tmp_path / "sets", sets)
    again.train(resume_from_checkpoint=str(tmp_path / "sets" / "checkpoint-9"))
    assert equal(weights(again.model), weights(trainer.model))
    assert again.reset_callback.reset_state == trainer.reset_callback.reset_state
    with pytest.raises(MetricError, match=r"'eval_loss' is not among .*eval_one_loss"):
        run(tmp_path / "named", sets, reset_metric="loss").train()


def test_a_configuration_that_is_set_on_the_callback_stands(tmp_path):
    trainer, _ = reset_run(tmp_path, train=False, reset_probability=0.0, reset_patience=0)
    given = ResetConfig(probability=1.0, patience=0)
    trainer.reset_callback.config = given
    for _ in range(2):
        trainer.train()
        assert trainer.reset_callback.config is given
        assert steps_of(trainer.reset_callback.events, "reset") == list(range(3, 15))
    trainer.args.reset_probability = 0.5
    with pytest.raises(ConfigError, match=r"`reset_callback.config` was set .* so were `reset_\*` fields"):
        trainer.train()


def test_a_field_that_is_set_wrong_after_construction_is_refused(tmp_path):
    trainer, _ = reset_run(tmp_path, train=False, **RESET)
    trainer.args.reset_policy = "sometimes"
    with pytest.raises(ConfigError, match="`policy` must be one of"):
        trainer.train()


def test_a_search_over_fields_is_a_search(tmp_path):
    """As Trainer does it for each trial, without a search library: fields are set just before training."""
    trainer, _ = reset_run(tmp_path, train=False, reset_probability=0.0, reset_patience=0)
    found = {}
    for probability in (0.0, 1.0):

        class Setting(type(trainer)):
            def _hp_search_setup(self, trial, probability=probability):
                self.args.reset_probability = probability
                super()._hp_search_setup(trial)

        trainer.__class__ = Setting
        trainer.train()
        found[probability] = len(steps_of(trainer.reset_callback.events, "reset"))
        trainer.__class__ = Setting.__mro__[1]
    assert found == {0.0: 0, 1.0: 12}


@pytest.mark.parametrize("way", ["remove", "pop", "plain-arguments"])
def test_a_callback_that_was_taken_away_stays_away(tmp_path, way):
    if way == "plain-arguments":
        trainer = ResetTrainer(bert(), arguments(tmp_path), train_dataset=TRAIN, eval_dataset=VALIDATION)
    else:
        trainer, _ = reset_run(tmp_path, train=False, **RESET)
    (trainer.pop_callback if way == "pop" else trainer.remove_callback)(StochasticResetCallback)
    trainer.train()
    assert trainer.reset_callback is None
    assert not any("reset/count" in record for record in trainer.state.log_history)


def test_no_gradient_norm_is_logged_for_a_step_without_gradients(tmp_path):
    trainer, _ = reset_run(tmp_path, **RESET)
    skipped = {step + 1 for step in steps_of(trainer.reset_callback.events, "reset")}
    norms = {h["step"]: h.get("grad_norm") for h in trainer.state.log_history if "loss" in h}
    assert len(skipped) > 2
    assert {step for step, norm in norms.items() if norm is None} == skipped
    assert all(norm > 0 for norm in norms.values() if norm is not None)


def test_reporters_get_one_scalar_for_each_reset_and_anchor_move(tmp_path):
    trainer, _ = reset_run(tmp_path, report_to="tensorboard", reset_optimizer_state="keep", **RESET)
    (run,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    events = trainer.reset_callback.events
    for tag, kind, value in (("reset/jump", "reset", "distance"), ("reset/anchor", "anchor", "metric")):
        name = next(name for name in accumulator.Tags()["scalars"] if name.endswith(tag))
        drawn = [(scalar.step, scalar.value) for scalar in accumulator.Scalars(name)]
        wanted = [(event["step"], event[value]) for event in events if event["kind"] == kind]
        assert [step for step, _ in drawn] == [step for step, _ in wanted]
        assert [number for _, number in drawn] == pytest.approx([number for _, number in wanted], rel=1e-6)


@pytest.mark.parametrize("options", [{"q": 0.7}, '{"q": 0.7}'])
def test_options_of_a_loss_may_be_a_mapping(tmp_path, options):
    args = arguments(tmp_path, ResetTrainingArguments, reset_loss="gce", reset_loss_options=options)
    assert args.loss_options() == {"q": 0.7}


@pytest.mark.parametrize("wrong", [["gce"], 3, {"gce": 1}])
def test_a_loss_of_a_wrong_type_is_an_error_of_our_own(tmp_path, wrong):
    with pytest.raises(ConfigError, match="`reset_loss` must be one of"):
        arguments(tmp_path, ResetTrainingArguments, reset_loss=wrong)


# TRL


def tokenizer():
    return train_tokenizer(["one two three four", "the answer is no"] * 20, vocab_size=300, kind="bpe")


def llama(vocabulary):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        )


PAIRS = Dataset.from_dict({"prompt": ["one two", "the answer is"] * 16, "completion": [" three four", " no"] * 16})
SFT = {"bf16": False, "max_length": 32, "dataset_num_proc": None}


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_sft_trainer_with_lora_resets_the_adapters_only(tmp_path, way):
    trl = pytest.importorskip("trl", reason="trl is not installed")

    class ResetSFTTrainer(ResetTrainerMixin, trl.SFTTrainer):
        pass

    @dataclass
    class Arguments(ResetArguments, trl.SFTConfig):
        pass

    words = tokenizer()
    fields = {"probability": 0.4, "patience": 0, "scope": "adapters"}
    mixin = way == "mixin"
    reset = None if mixin else StochasticResetCallback(**fields)
    args = arguments(
        tmp_path,
        Arguments if mixin else trl.SFTConfig,
        **SFT,
        **({f"reset_{name}": value for name, value in fields.items()} if mixin else {}),
    )
    if mixin:
        assert (
            args.gradient_checkpointing
            == trl.SFTConfig(output_dir="x", use_cpu=True, bf16=False).gradient_checkpointing
        )
    recorder = Recorder()
    trainer = (ResetSFTTrainer if mixin else trl.SFTTrainer)(
        model=llama(len(words)),
        args=args,
        processing_class=words,
        train_dataset=PAIRS,
        eval_dataset=PAIRS.select(range(8)),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
        callbacks=[c for c in (reset, recorder) if c is not None],
    )
    before = weights(trainer.model)
    trainer.train()
    reset = reset or trainer.reset_callback
    resets = [event for event in reset.events if event["kind"] == "reset"]
    assert resets
    assert all("lora_" in name for name in reset.store.names)
    for event in resets:
        landed, anchor = recorder.after_step[event["step"] + 1], recorder.evaluated[event["anchor_step"]][1]
        assert equal(landed, anchor)
    after = weights(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before if "lora_" not in name)
    if mixin:
        assert any("reset/count" in record for record in trainer.state.log_history)
