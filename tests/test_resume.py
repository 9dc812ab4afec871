"""A run stopped at any checkpoint and resumed ends as if it had not been, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TRAIN, VALIDATION, arguments, bert, callback, equal, plain_run, reset_run, weights
from transformers import TrainerCallback

from hf_reset import ResetTrainer, ResetTrainingArguments, StochasticResetCallback, last_whole_checkpoint
from hf_reset.errors import AnchorFileError

SAVING = {"save_strategy": "steps", "save_steps": 3}
RESET = {"reset_probability": 0.5, "reset_patience": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run of each kind, with all its checkpoints."""
    directory = tmp_path_factory.mktemp("whole")
    reset = callback()
    by_callback = plain_run(directory / "callback", callback=reset, **SAVING)[0]
    by_trainer = reset_run(directory / "trainer", **SAVING, **RESET)[0]
    return {"callback": (by_callback, reset), "trainer": (by_trainer, by_trainer.reset_callback)}


def same_logs(one, other):
    def content(trainer):
        timing = ("runtime", "per_second", "flos")
        return [
            {k: v for k, v in record.items() if not any(t in k for t in timing) and k != "train_loss"}
            for record in trainer.state.log_history
        ]

    return content(one) == content(other)


@pytest.mark.parametrize("flag", [False, True], ids=["flag-off", "flag-on"])
@pytest.mark.parametrize(
    ("kind", "stop"),
    # From the last step the stock Trainer takes one step more; ResetTrainer ends there.
    [("callback", stop) for stop in (3, 6, 9, 12)] + [("trainer", stop) for stop in (3, 6, 9, 12, 15)],
)
def test_resume_is_exact_at_each_checkpoint(whole, kind, stop, flag, tmp_path):
    trainer, reset = whole[kind]
    home = Path(trainer.args.output_dir)
    checkpoint = str(home / f"checkpoint-{stop}")
    settings = {**SAVING, "restore_callback_states_from_checkpoint": flag}
    if kind == "callback":
        fresh = callback()
        # The plain callback looks into output_dir, so the run goes on in a copy of it.
        shutil.copytree(home, tmp_path, dirs_exist_ok=True)
        resumed, recorder = plain_run(tmp_path, callback=fresh, train=False, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    else:
        resumed, recorder = reset_run(tmp_path, resume=checkpoint, **settings, **RESET)
        fresh = resumed.reset_callback
    assert equal(weights(resumed.model), weights(trainer.model))
    assert fresh.events == reset.events
    assert fresh.reset_state == reset.reset_state
    assert same_logs(resumed, trainer)
    assert len(recorder.after_step) == 15 - stop


def test_a_negative_control_without_the_anchor_it_differs(whole, tmp_path):
    """What the anchor file holds matters: zero it, and the resumed run ends elsewhere."""
    trainer, _ = whole["trainer"]
    shutil.copytree(trainer.args.output_dir, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoint-6" / "reset_anchor.safetensors"
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata()
        tensors = {key: torch.zeros_like(stored.get_tensor(key)) for key in stored.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata=header)
    resumed, _ = reset_run(tmp_path / "out", resume=str(tmp_path / "checkpoint-6"), **SAVING, **RESET)
    assert not equal(weights(resumed.model), weights(trainer.model))


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_on_start": True, "save_steps": 2},  # resumed between evaluations, where one must not count
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"load_best_model_at_end": True, "save_total_limit": 1},
        {"save_steps": 2},  # checkpoints between evaluations
        {"reset_anchor": "fixed"},
        {"reset_policy": "periodic", "reset_probability": 0.3},
        {"reset_policy": "luby", "reset_probability": 0.7},
        {"reset_probability": "auto", "eval_steps": 1},
        {"reset_scope": "head"},
        {"reset_optimizer_state": "zero"},
        {"reset_optimizer_state": "keep"},
        {"reset_storage": "cpu"},
        {"reset_max_resets": 3},
        {"reset_patience": 2},
        {"reset_probability": 0.0, "reset_finish": "last"},
        {"optim": "adafactor"},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_resume_is_exact_in_other_set_ups(tmp_path, settings):
    settings = {**SAVING, **RESET, **settings}
    trainer, _ = reset_run(tmp_path / "whole", **settings)
    for stop in (4, 8) if settings["save_steps"] == 2 else (6,):
        stopped, _ = reset_run(tmp_path / f"stopped{stop}", train=False, **settings)
        stopped.add_callback(_StopAt(stop))
        stopped.train()
        resumed, _ = reset_run(tmp_path / f"stopped{stop}", resume=True, **settings)
        assert equal(weights(resumed.model), weights(trainer.model))
        assert resumed.reset_callback.events == trainer.reset_callback.events
        if "eval_on_start" not in settings:  # the Trainer evaluates, and logs, once more at the start
            assert same_logs(resumed, trainer)


class _StopAt(TrainerCallback):
    """Ends training after the checkpoint of a step, as a time limit would."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


def test_the_plain_callback_says_what_it_cannot_find(whole, tmp_path):
    trainer, _ = whole["callback"]
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-6")
    elsewhere, _ = plain_run(tmp_path, callback=callback(), train=False, **SAVING)
    with pytest.raises(
        AnchorFileError, match=r"had an anchor, and there is no .*resume_from_checkpoint=.*ResetTrainer"
    ):
        elsewhere.train(resume_from_checkpoint=checkpoint)
    named = StochasticResetCallback(probability=0.5, patience=0, resume_from_checkpoint=checkpoint)
    resumed, _ = plain_run(tmp_path, callback=named, train=False, **SAVING)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert equal(weights(resumed.model), weights(trainer.model))


def test_a_checkpoint_of_the_same_number_from_another_run_is_not_taken(whole, tmp_path):
    trainer, _ = whole["callback"]
    plain_run(tmp_path, callback=callback(seed=99), **SAVING, learning_rate=1e-3)
    resumed, _ = plain_run(tmp_path, callback=callback(), train=False, **SAVING)
    with pytest.raises(AnchorFileError, match="belongs to another run than the checkpoint being resumed"):
        resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-9"))


def test_a_run_that_began_without_the_callback_takes_it_up(tmp_path):
    plain_run(tmp_path, **SAVING)
    reset = callback()
    resumed, _ = plain_run(tmp_path, callback=reset, train=False, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert reset.events[0]["step"] == 9


def test_a_run_goes_on_without_the_callback_it_began_with(whole, tmp_path):
    trainer, _ = whole["callback"]
    resumed, _ = plain_run(tmp_path, train=False, restore_callback_states_from_checkpoint=True, **SAVING)
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-6"))
    assert resumed.state.global_step == 15


def test_another_scope_on_resume_is_refused(whole, tmp_path):
    trainer, _ = whole["trainer"]
    with pytest.raises(AnchorFileError, match="belongs to another scope"):
        reset_run(
            tmp_path, resume=str(Path(trainer.args.output_dir) / "checkpoint-6"), reset_scope="head", **SAVING, **RESET
        )


def test_a_truncated_anchor_is_passed_over_or_refused(whole, tmp_path):
    trainer, _ = whole["trainer"]
    shutil.copytree(trainer.args.output_dir, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoint-15" / "reset_anchor.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert last_whole_checkpoint(tmp_path).endswith("checkpoint-12")
    resumed, recorder = reset_run(tmp_path, resume=True, **SAVING, **RESET)
    assert sorted(recorder.after_step) == [13, 14, 15]
    assert equal(weights(resumed.model), weights(trainer.model))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AnchorFileError, match=r"checkpoint-15.*is truncated"):
        reset_run(tmp_path / "x", resume=str(tmp_path / "checkpoint-15"), **SAVING, **RESET)


def test_no_whole_checkpoint_is_said(tmp_path):
    with pytest.raises(AnchorFileError, match=r"^No valid checkpoint found in output directory \("):
        reset_run(tmp_path, resume=True, **SAVING, **RESET)


def test_a_checkpoint_written_again_is_not_whole_meanwhile(whole, tmp_path):
    """Its old trainer_state.json would vouch for new, half-written files."""
    trainer, _ = whole["trainer"]
    shutil.copytree(trainer.args.output_dir, tmp_path, dirs_exist_ok=True)
    seen = []

    class Spying(ResetTrainer):
        def save_model(self, *args, **kwargs):
            seen.append(last_whole_checkpoint(tmp_path))
            super().save_model(*args, **kwargs)

    again = Spying(
        bert(),
        arguments(tmp_path, ResetTrainingArguments, **SAVING, **RESET),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert seen == [str(tmp_path / "checkpoint-12")]
    assert last_whole_checkpoint(tmp_path).endswith("checkpoint-15")


WORKER = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import tiny, hf_reset
    from transformers import TrainerCallback

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            print(state.global_step, flush=True)

    whole = hf_reset.last_whole_checkpoint(sys.argv[2])
    trainer, _ = tiny.reset_run(
        sys.argv[2], resume=bool(whole) or None, callbacks=[Mark()],
        reset_probability=0.5, reset_patience=0, save_strategy="steps", save_steps=1, save_total_limit=3,
    )
    """
)


def test_sigkill_during_any_write_resumes_from_the_last_whole_checkpoint(whole, tmp_path):
    """A run that saves at every step is killed at three moments, in whatever it was writing, and ends the same.

    The long form, with sixty kills over several processes, is recipes/benchmarks/survival.py.
    """
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    for lines, delay in ((2, 0.004), (3, 0.02), (2, 0.05)):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        for _ in range(lines):
            while not process.stdout.readline().strip().isdigit():
                assert process.poll() is None
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    newest = Path(last_whole_checkpoint(tmp_path))
    assert newest.name == "checkpoint-15"
    expected, _ = reset_run(tmp_path / "whole", save_strategy="steps", save_steps=1, **RESET)
    last = load_file(tmp_path / "whole" / "checkpoint-15" / "model.safetensors")
    assert equal(load_file(newest / "model.safetensors"), last)
    anchors = [
        load_file(home / "checkpoint-15" / "reset_anchor.safetensors") for home in (tmp_path, tmp_path / "whole")
    ]
    assert equal(*anchors)
    assert json.loads((newest / "trainer_state.json").read_text())["global_step"] == 15
    assert expected.state.global_step == 15


def test_jit_checkpoints_have_their_anchor(tmp_path):
    """Trainer's just-in-time checkpoint calls `_save_checkpoint` itself, and `on_save` never fires."""
    trainer, _ = reset_run(tmp_path, **RESET)
    trainer._save_checkpoint(trainer.model, trial=None)
    assert (tmp_path / "checkpoint-15" / "reset_anchor.safetensors").is_file()


def test_model_only_checkpoints_carry_no_anchor(tmp_path):
    for run in (
        reset_run(tmp_path / "a", save_only_model=True, **SAVING, **RESET),
        plain_run(tmp_path / "b", callback=callback(), save_only_model=True, **SAVING),
    ):
        files = [p.name for p in (Path(run[0].args.output_dir) / "checkpoint-6").iterdir()]
        assert "reset_anchor.safetensors" not in files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reset_policy": "periodic"}, "`policy` 'periodic' (was 'bernoulli')"),
        ({"reset_seed": 99}, "`seed` 99 (was 7)"),
        ({"reset_probability": 0.25}, "`probability` 0.25 (was 0.5)"),
        ({"reset_metric": "runtime", "reset_greater_is_better": True}, "`metric` 'eval_runtime' (was 'eval_loss')"),
    ],
)
def test_what_is_resumed_otherwise_is_said_field_by_field(whole, tmp_path, caplog, change, said):
    trainer, _ = whole["trainer"]
    checkpoint = str(Path(trainer.args.output_dir) / "checkpoint-6")
    resumed, _ = reset_run(tmp_path, resume=checkpoint, **{**SAVING, **RESET, **change})
    assert said in caplog.text
    later = [event for event in resumed.reset_callback.events if event["step"] > 6]
    if "reset_metric" in change:  # the best loss would never be beaten by seconds, or always
        assert "is not kept" in caplog.text
        assert later[0]["kind"] == "anchor"
        assert later[0]["step"] == 9
        assert later[0]["metric"] == next(
            record["eval_runtime"]
            for record in resumed.state.log_history
            if record["step"] == 9 and "eval_loss" in record
        )


def test_nothing_is_said_of_what_is_the_same(whole, tmp_path, caplog):
    trainer, _ = whole["trainer"]
    reset_run(tmp_path, resume=str(Path(trainer.args.output_dir) / "checkpoint-6"), **SAVING, **RESET)
    assert "Resuming with" not in caplog.text


@pytest.mark.parametrize(
    "tamper",
    [
        lambda header: header.pop("state"),
        lambda header: header.pop("trail"),
        lambda header: header["state"].update(best="low"),
        lambda header: header["state"].update(unknown=1),
        lambda header: header["config"].update(probability=7),
        lambda header: header.update(seed="seven"),
        lambda header: header.update(evidence=3),
        lambda header: header.update(metric=None),
    ],
)
def test_a_tampered_header_is_an_error_of_our_own(whole, tmp_path, tamper):
    trainer, _ = whole["trainer"]
    shutil.copytree(Path(trainer.args.output_dir) / "checkpoint-6", tmp_path / "checkpoint-6")
    file = tmp_path / "checkpoint-6" / "reset_anchor.safetensors"
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata()
    metadata = json.loads(header["metadata"])
    tamper(metadata)
    save_file(load_file(file), file, metadata={**header, "metadata": json.dumps(metadata)})
    with pytest.raises(AnchorFileError, match=r"reset_anchor\.safetensors' is not as this version writes it"):
        reset_run(tmp_path, resume=str(tmp_path / "checkpoint-6"), **SAVING, **RESET)
