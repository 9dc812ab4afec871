"""The average is a plain-PyTorch average's twin, and what is evaluated, anchored, saved and finished with."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_invariants import EVERY, LR, STEPS, batch
from tiny import TRAIN, VALIDATION, Recorder, arguments, bert, callback, equal, plain_run, reset_run, steps_of, weights
from torch import nn
from transformers import TrainerCallback
from transformers.optimization import get_linear_schedule_with_warmup

from hf_reset import AnchorStore, ResetConfig, ResetTrainer, ResetTrainingArguments, last_whole_checkpoint
from hf_reset.errors import AnchorError, AnchorFileError, ConfigError, UnsupportedError
from hf_reset.policy import uniform
from hf_reset.training.ema import Average

DECAY, SEED, R = 0.8, 9, 0.4  # resets away from evaluations, where the average is not the anchor already
SAVING = {"save_strategy": "steps", "save_steps": 3}
EMA = {"reset_ema_decay": DECAY, "reset_patience": 0, "reset_probability": 0.0}
RESETS = {**EMA, "reset_probability": R, "reset_seed": SEED}


class Averages(TrainerCallback):
    """The average after each step."""

    def __init__(self):
        self.after_step = {}

    def on_step_end(self, args, state, control, **kwargs):
        average = self.trainer.reset_callback.average.tensors()
        self.after_step[state.global_step] = {name: value.clone() for name, value in average.items()}


def ema_run(output_dir, *, resume=None, train=True, **more):
    """A ResetTrainer, live weights and averages after each step."""
    averages = Averages()
    trainer, recorder = reset_run(output_dir, callbacks=[averages], train=False, **more)
    averages.trainer = trainer
    if train:
        trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder, averages.after_step


def twin(probability):
    """Resets and averaging in plain PyTorch; live weights and average after each step, and what was evaluated."""
    model = bert(dropout=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    average, anchor, best = [p.detach().clone() for p in model.parameters()], None, float("inf")
    live, averages, evaluated, resets = {}, {}, {}, []
    names = [name for name, _ in model.named_parameters()]
    for step in range(STEPS):
        model.train()
        model(**batch(TRAIN, 8 * step, 8)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            if anchor is not None and uniform(SEED, step) < probability:
                resets.append(step)
                for p, value, (kept, state) in zip(model.parameters(), average, anchor, strict=True):
                    p.copy_(kept), value.copy_(kept)
                    for key in state:
                        optimizer.state[p][key].copy_(state[key])
            else:
                for p, value in zip(model.parameters(), average, strict=True):
                    value.lerp_(p, 1 - DECAY)
        schedule.step()
        optimizer.zero_grad()
        live[step + 1] = weights(model)
        averages[step + 1] = {name: value.clone() for name, value in zip(names, average, strict=True)}
        if (step + 1) % EVERY == 0:
            judge = bert(dropout=0).eval()
            with torch.no_grad():
                for p, value in zip(judge.parameters(), average, strict=True):
                    p.copy_(value)
                loss = judge(**batch(VALIDATION, 0, len(VALIDATION))).loss.item()
            evaluated[step + 1] = (loss, averages[step + 1])
            if loss < best:
                best = loss
                states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
                anchor = list(zip([value.clone() for value in average], states, strict=True))
    return live, averages, evaluated, resets


@pytest.mark.parametrize("probability", [0.0, R], ids=["alone", "with-resets"])
def test_equal_to_the_twin_at_every_step(probability, tmp_path):
    live, averages, evaluated, resets = twin(probability)
    assert bool(resets) is (probability > 0)
    trainer, recorder, ours = ema_run(
        tmp_path,
        model=bert(dropout=0),
        **{**RESETS, "reset_probability": probability},
        train_sampling_strategy="sequential",
        learning_rate=LR,
    )
    for step in range(1, STEPS + 1):
        assert equal(recorder.after_step[step], live[step]), step
        assert equal(ours[step], averages[step]), step
        assert not equal(live[step], averages[step]) or step - 1 in resets
    for step, (loss, weighed) in evaluated.items():
        assert recorder.evaluated[step][0] == loss
        assert equal(recorder.evaluated[step][1], weighed)
    assert steps_of(trainer.reset_callback.events, "reset") == resets
    best = min(evaluated, key=lambda step: evaluated[step][0])
    assert equal(weights(trainer.model), evaluated[best][1])  # finished with the best average


def test_alone_it_leaves_the_training_as_it_was(tmp_path):
    _, plain = plain_run(tmp_path / "plain")
    _, recorder, averages = ema_run(tmp_path / "ema", **EMA)
    assert all(equal(recorder.after_step[step], plain.after_step[step]) for step in plain.after_step)
    assert not equal(averages[15], plain.after_step[15])


def test_a_reset_sets_live_weights_and_average_to_the_anchor(tmp_path):
    trainer, recorder, averages = ema_run(tmp_path, **RESETS)
    resets = [event for event in trainer.reset_callback.events if event["kind"] == "reset"]
    assert len(resets) >= 3
    for event in resets:
        anchor = recorder.evaluated[event["anchor_step"]][1]
        assert equal(recorder.after_step[event["step"] + 1], anchor)
        assert equal(averages[event["step"] + 1], anchor)


def test_the_live_weights_come_back_after_each_evaluation(tmp_path):
    class After(TrainerCallback):
        def __init__(self):
            self.begun = {}

        def on_step_begin(self, args, state, control, **kwargs):
            self.begun[state.global_step] = weights(kwargs["model"])

    after = After()
    trainer, recorder = reset_run(tmp_path, callbacks=[after], **EMA, **SAVING)
    for step in (3, 6, 9, 12):
        assert equal(after.begun[step], recorder.after_step[step])
        assert not equal(recorder.evaluated[step][1], recorder.after_step[step])
    assert trainer.evaluate()["eval_loss"] == min(loss for loss, _ in recorder.evaluated.values())


def test_what_is_saved_is_the_average(tmp_path):
    class Saves(TrainerCallback):
        """A user's own save and prediction in mid-training."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                self.trainer.save_model(str(tmp_path / "own"))
                self.predicted = self.trainer.predict(VALIDATION).metrics["test_loss"]

    saves = Saves()
    trainer, _, averages = ema_run(tmp_path, train=False, **EMA, **SAVING)
    trainer.add_callback(saves)
    saves.trainer = trainer
    trainer.train()
    for step in (3, 6, 9, 12, 15):
        assert equal(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"), averages[step])
    assert equal(load_file(tmp_path / "own" / "model.safetensors"), averages[4])
    judge, _ = plain_run(tmp_path / "judge", train=False)
    judge.model.load_state_dict(averages[4])
    assert judge.evaluate(VALIDATION)["eval_loss"] == saves.predicted


@pytest.mark.parametrize(
    ("settings", "step_of"),
    [
        ({"reset_finish": "last"}, lambda evaluated: 15),
        ({"reset_finish": "last", "eval_strategy": "no"}, lambda evaluated: 15),
        ({"reset_finish": "anchor"}, lambda evaluated: min(evaluated, key=lambda step: evaluated[step][0])),
        (
            {"reset_finish": "last", "load_best_model_at_end": True, **SAVING},
            lambda evaluated: min(evaluated, key=lambda step: evaluated[step][0]),
        ),
    ],
    ids=["last", "no-evaluation", "anchor", "load-best"],
)
def test_the_end_is_an_average(settings, step_of, tmp_path):
    trainer, recorder, averages = ema_run(tmp_path, **{**EMA, **settings}, learning_rate=2e-2)
    step = step_of(recorder.evaluated)
    assert (step < 15) is (settings["reset_finish"] == "anchor" or "load_best_model_at_end" in settings)
    assert equal(weights(trainer.model), averages[step])
    trainer.save_model(str(tmp_path / "end"))
    assert equal(load_file(tmp_path / "end" / "model.safetensors"), averages[step])


LORA = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all", "modules_to_save": ["pooler"]}


def adapted():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(bert(), peft.LoraConfig(**LORA))


KINDS = {
    "all": (bert, {}),
    "head": (bert, {"reset_scope": "head"}),
    "lora": (adapted, {}),
    "bf16": (lambda: bert().to(torch.bfloat16), {"learning_rate": 2e-2}),
    "cpu": (bert, {"reset_storage": "cpu"}),
}


@pytest.mark.parametrize("probability", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(kind, probability, tmp_path):
    make, more = KINDS[kind]
    settings = {**SAVING, **EMA, **more, "reset_probability": probability}
    trainer, recorder, averages = ema_run(tmp_path / "whole", model=make(), **settings)
    if probability:
        assert len(steps_of(trainer.reset_callback.events, "reset")) >= 3
    for stop in (3, 9):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{stop}")
        again, resumed, later = ema_run(tmp_path / str(stop), model=make(), resume=checkpoint, **settings)
        assert sorted(later) == list(range(stop + 1, 16))
        for step in later:
            assert equal(resumed.after_step[step], recorder.after_step[step]), step
            assert equal(later[step], averages[step]), step
        assert equal(weights(again.model), weights(trainer.model))
        assert again.reset_callback.events == trainer.reset_callback.events


def test_a_negative_control_without_its_file_the_resumed_run_goes_on_from_the_average(tmp_path, caplog):
    _, recorder, _ = ema_run(tmp_path, **EMA, **SAVING)
    checkpoint = tmp_path / "checkpoint-9"
    (checkpoint / "reset_average.safetensors").unlink()
    with caplog.at_level("WARNING", logger="hf_reset"):
        _, resumed, _ = ema_run(tmp_path / "again", resume=str(checkpoint), **EMA, **SAVING)
    assert "has no average" in caplog.text
    assert not equal(resumed.after_step[10], recorder.after_step[10])


def test_resuming_without_averaging_says_that_the_weights_are_an_average(tmp_path, caplog):
    ema_run(tmp_path, **EMA, **SAVING)
    with caplog.at_level("WARNING", logger="hf_reset"):
        reset_run(tmp_path / "again", resume=str(tmp_path / "checkpoint-9"), reset_probability=0.0, **SAVING)
    assert "reset_average" in caplog.text
    assert "`ema_decay`" in caplog.text


def test_a_checkpoint_with_half_an_average_is_not_whole(tmp_path):
    ema_run(tmp_path, **EMA, **SAVING)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-15")
    file = tmp_path / "checkpoint-15" / "reset_average.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")


@pytest.mark.parametrize("scope", ["head", r"\.bias$"])
def test_outside_the_scope_the_live_weights_are_evaluated(scope, tmp_path):
    _, recorder, averages = ema_run(tmp_path, **EMA, reset_scope=scope)
    for step, (_, evaluated) in recorder.evaluated.items():
        assert averages[step].keys() < evaluated.keys()
        for name, value in evaluated.items():
            assert torch.equal(value, averages[step].get(name, recorder.after_step[step][name]))


# The piece by itself


def drift(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1)


def test_equal_to_torchs_averaged_model_batch_norm_and_all():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    mean = torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=mean, use_buffers=True)
    theirs.update_parameters(model)  # its first update is a copy
    ours = Average(model, decay=DECAY)
    for seed in range(5):
        drift(model, seed)
        model(torch.randn(8, 3) + seed)
        ours.update(), theirs.update_parameters(model)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with ours.swapped():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                assert torch.equal(value, theirs.module.state_dict()[name]), name
        assert model[1].num_batches_tracked.item() == 5
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_half_precision_weights_are_averaged_in_float32_and_come_back_bit_for_bit():
    model = bert().to(torch.bfloat16)
    average = Average(model, decay=0.999)
    exact = {name: p.detach().float() for name, p in model.named_parameters()}
    for seed in range(3):
        drift(model, seed)
        average.update()
        for name, p in model.named_parameters():
            exact[name] = exact[name] + 0.001 * (p.detach().float() - exact[name])
    live, before = weights(model), {name: value.clone() for name, value in average.tensors().items()}
    assert all(value.dtype == torch.float32 for value in before.values())
    for name, value in before.items():
        torch.testing.assert_close(value, exact[name])
    with average.swapped(), average.swapped():
        assert equal(weights(model), {name: value.to(torch.bfloat16) for name, value in before.items()})
        for verb in (average.update, average.follow, average.put_in, average.tensors):
            with pytest.raises(AnchorError, match=r"inside `swapped\(\)`"):
                verb()
    assert equal(weights(model), live)
    assert equal(average.tensors(), before)
    average.put_in()
    assert equal(weights(model), {name: value.to(torch.bfloat16) for name, value in before.items()})


def test_bytes_are_those_of_the_scope_in_float32():
    model = bert().to(torch.bfloat16)
    anchor = AnchorStore(model, scope="head")
    assert Average(model, scope="head", decay=0.9).nbytes == 2 * anchor.nbytes


def test_a_file_of_another_model_is_refused(tmp_path):
    average = Average(bert(), decay=0.9)
    with pytest.raises(AnchorError, match=r"outside `swapped\(\)`"):
        average.save(tmp_path / "a")
    with average.swapped():
        average.save(tmp_path / "a", {"note": 1})
    assert average.load(tmp_path / "a") == {"note": 1}
    for other in (bert(hidden_size=32), bert().to(torch.bfloat16)):
        with pytest.raises(AnchorFileError, match=r"another model, scope or precision.*tensors differ"):
            Average(other, decay=0.9).load(tmp_path / "a")


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), "0.9", True])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ConfigError, match=r"`ema_decay` must be in \[0, 1\) or None, got "):
        ResetConfig(ema_decay=decay)


def test_the_plain_callback_refuses_in_words(tmp_path):
    """It is not told before an evaluation, so the average could not be what is evaluated."""
    with pytest.raises(UnsupportedError, match=r"`ema_decay` needs ResetTrainer.*`ResetTrainerMixin`"):
        plain_run(tmp_path, callback=callback(ema_decay=0.9))


def test_the_callback_in_a_reset_trainer_will_do(tmp_path):
    recorder = Recorder()
    reset = callback(probability=0, ema_decay=DECAY)
    trainer = ResetTrainer(
        bert(), arguments(tmp_path), train_dataset=TRAIN, eval_dataset=VALIDATION, callbacks=[reset, recorder]
    )
    trainer.train()
    _, other = reset_run(tmp_path / "b", **EMA)
    assert all(equal(recorder.evaluated[step][1], other.evaluated[step][1]) for step in recorder.evaluated)


def test_a_trainer_used_twice_averages_anew(tmp_path):
    trainer, _, averages = ema_run(tmp_path, **EMA, reset_finish="last")
    first = averages[15]
    trainer.train()
    assert not equal(averages[1], first)
    assert equal(weights(trainer.model), averages[15])

    def decay(**fields):
        return ResetTrainingArguments(output_dir=str(tmp_path), **fields).reset_config().ema_decay

    assert decay(reset_ema_decay=0.5) == decay(reset_ema_decay="0.5") == 0.5
    assert decay() is None
    assert decay(reset_refine="soft") == decay(reset_ema_decay="auto") == "auto"
    assert decay(reset_refine="soft", reset_ema_decay=0) is None
    with pytest.raises(ConfigError, match="got 'slow'"):
        decay(reset_ema_decay="slow")


def test_auto_looks_back_over_a_sixteenth_of_the_run():
    steps = [1, 16, 160, 800, 10_000]
    assert [ResetConfig(ema_decay="auto").decay_in(n) for n in steps] == [0, 0, 0.9, 0.98, 0.98]
    assert [ResetConfig(ema_decay=d).decay_in(160) for d in (None, 0.5)] == [0, 0.5]


def test_auto_is_what_the_average_of_a_run_goes_by(tmp_path):
    def last(folder, decay):
        return ema_run(tmp_path / folder, **{**EMA, "reset_ema_decay": decay}, max_steps=32)[2][32]

    assert equal(last("auto", "auto"), last("same", 0.5))


def test_sft_with_lora_saves_the_adapter_that_was_evaluated_and_resumes_with_one(tmp_path):
    """TRL's own averaging callback doubles the adapter after a resume, and averages what is random before training."""
    pytest.importorskip("trl", reason="trl is not installed")
    from test_trainer import PAIRS, SFT, llama, tokenizer

    from hf_reset.training.sft import ResetSFTConfig, ResetSFTTrainer

    words = tokenizer()

    def run(folder, resume=None):
        recorder = Recorder()
        trainer = ResetSFTTrainer(
            model=llama(len(words)),
            args=arguments(folder, ResetSFTConfig, **SFT, **EMA, **SAVING),
            processing_class=words,
            train_dataset=PAIRS,
            eval_dataset=PAIRS.select(range(8)),
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
            callbacks=[recorder],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder

    trainer, recorder = run(tmp_path / "whole")
    saved = load_file(tmp_path / "whole" / "checkpoint-6" / "adapter_model.safetensors")
    for name, value in recorder.evaluated[6][1].items():
        if "lora_" in name:
            assert torch.equal(saved[name.replace(".default", "")], value)
    again, resumed = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-6"))
    assert all(equal(resumed.after_step[step], recorder.after_step[step]) for step in resumed.after_step)
    assert equal(weights(again.model), weights(trainer.model))
    assert list(again.model.peft_config) == ["default"]
