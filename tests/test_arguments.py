"""The reset_* fields: the same as ResetConfig's, on the command line too."""

from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_reset import ResetArguments, ResetConfig, ResetTrainingArguments
from hf_reset.errors import ConfigError


def test_each_field_of_the_config_is_there_with_its_default():
    ours = {f.name: f.default for f in fields(ResetArguments)}
    config = {f"reset_{f.name}": f.default for f in fields(ResetConfig)}
    others = {
        "reset_advice": True,
        "reset_loss": None,
        "reset_loss_options": None,
        "reset_row_memory": None,
        "reset_refine": "off",
        "reset_evaluation": "full",
        "reset_full_evaluation_every": 20,
        "reset_evaluation_at": "schedule",
    }
    assert ours == config | others
    assert all(f.metadata["help"] for f in fields(ResetArguments))


def test_nothing_else_is_added_to_training_arguments(tmp_path):
    added = {f.name for f in fields(ResetTrainingArguments)} - {f.name for f in fields(TrainingArguments)}
    assert added == {f.name for f in fields(ResetArguments)}
    args = ResetTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.reset_config() == ResetConfig()
    assert "reset_probability" in args.to_dict()


def test_the_command_line(tmp_path):
    line = (
        f"--output_dir {tmp_path} --use_cpu --reset_probability 0.05 --reset_scope last:2 --reset_policy periodic "
        "--reset_patience 0 --reset_metric f1 --reset_greater_is_better true --reset_min_delta 0.1 "
        "--reset_anchor fixed --reset_optimizer_state zero --reset_storage cpu --reset_finish last "
        "--reset_max_resets 4 --reset_seed 3 --reset_ema_decay 0.98"
    )
    (args,) = HfArgumentParser(ResetTrainingArguments).parse_args_into_dataclasses(line.split())
    assert args.reset_config() == ResetConfig(
        probability=0.05,
        scope="last:2",
        policy="periodic",
        patience=0,
        metric="f1",
        greater_is_better=True,
        min_delta=0.1,
        anchor="fixed",
        optimizer_state="zero",
        storage="cpu",
        finish="last",
        max_resets=4,
        seed=3,
        ema_decay=0.98,
    )


def test_auto_and_numbers_on_the_command_line(tmp_path):
    def probability(text):
        line = f"--output_dir {tmp_path} --use_cpu --reset_probability {text}"
        (args,) = HfArgumentParser(ResetTrainingArguments).parse_args_into_dataclasses(line.split())
        return args.reset_config().probability

    assert probability("auto") == "auto"
    assert probability("1e-3") == 0.001
    with pytest.raises(ConfigError, match=r"`probability` must be in \[0, 1\], got 'often'"):
        probability("often")


def test_a_list_as_scope_is_json(tmp_path):
    def scope(text):
        return ResetTrainingArguments(output_dir=str(tmp_path), use_cpu=True, reset_scope=text).reset_config().scope

    assert scope('["classifier", "pooler.dense"]') == ["classifier", "pooler.dense"]
    assert scope("[ab]$") == "[ab]$"
    assert scope(["classifier"]) == ["classifier"]


def test_a_bad_value_is_refused_when_the_arguments_are_made(tmp_path):
    with pytest.raises(ConfigError, match=r"`probability` must be in \[0, 1\], got 1.5"):
        ResetTrainingArguments(output_dir=str(tmp_path), use_cpu=True, reset_probability=1.5)


def test_help_prints(capsys):
    with pytest.raises(SystemExit) as stop:
        HfArgumentParser(ResetTrainingArguments).parse_args_into_dataclasses(["--help"])
    assert stop.value.code == 0
    assert "--reset_probability" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reset_loss": "mae"}, "`reset_loss` must be one of .*gce.*, got 'mae'"),
        ({"reset_loss": "gce", "reset_loss_options": "q=1"}, "`reset_loss_options` must be a JSON object"),
        ({"reset_loss_options": '{"q": 1}'}, "needs a `reset_loss` to apply to"),
    ],
)
def test_a_bad_loss_is_refused_when_the_arguments_are_made(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        ResetTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)
