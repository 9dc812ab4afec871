"""`hf-reset scopes MODEL_DIR` and `hf-reset plan OUTPUT_DIR`."""

import json
import subprocess
import sys
import time

import peft
import pytest
from tiny import bert, plain_run

from hf_reset.cli import main
from hf_reset.planner.excursions import EVENTS


def test_scopes_of_a_model_directory(tmp_path, capsys):
    model = bert()
    model.save_pretrained(tmp_path)
    assert main(["scopes", str(tmp_path), "--scope", "pooler", "--names"]) == 0
    out = capsys.readouterr().out
    table = out.split("\n\n")[0]
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    head = sum(p.numel() for p in model.classifier.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert rows["head"][1:4] == ["2", f"{head:,}", f"{head * 4:,}"]
    assert rows["all"][2] == f"{total:,}"
    assert "no adapter" in out
    assert "bert.pooler.dense.weight  (16, 16)" in out


def test_scopes_of_an_adapter_directory(tmp_path, capsys):
    bert().save_pretrained(tmp_path / "base")
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(
        tmp_path / "adapter"
    )
    assert main(["scopes", str(tmp_path / "adapter")]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["adapters"][1:3] == ["4", "128"]  # two layers of A (2, 16) and B (16, 2)
    assert rows["head"][1:3] == ["2", "51"]


def test_no_model_there(tmp_path, capsys):
    assert main(["scopes", str(tmp_path)]) == 2
    assert "has neither config.json nor adapter_config.json. Name a directory" in capsys.readouterr().err


def finished(folder, values, every=10, resets=(), name="eval_loss"):
    """A directory as a Trainer leaves it, with one evaluation every so many steps."""
    log = [{"step": every * k, name: value} for k, value in enumerate(values, start=1)]
    events = [{"kind": "reset", "step": step, "metric": 1.0} for step in resets]
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(
        json.dumps({"log_history": log, "stateful_callbacks": {EVENTS: events}, "global_step": every * len(values)})
    )
    return str(folder)


def test_plan_of_a_run_that_only_improves(tmp_path, capsys):
    folder = finished(tmp_path / "run", [1 - 0.01 * k for k in range(40)])
    assert main(["plan", folder]) == 0
    out = capsys.readouterr().out
    assert "39 excursions by eval_loss, evaluated every 10 steps; 39 ended with a new best; hazard: rising." in out
    assert "probability     0 (no resets)" in out
    assert "Do not reset" in out
    picture = tmp_path / "run" / "reset_plan.png"
    assert f"Picture: {picture}" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_plan_of_a_run_with_resets(tmp_path, capsys):
    # The first evaluation after a reset is a new best, and none of the five after it.
    starts = range(2, 230, 6)
    values = [1.0 - 0.001 * k if k - 1 in starts else 2.0 for k in range(240)]
    folder = finished(tmp_path / "run", values, resets=[10 * k + 15 for k in starts])
    assert main(["plan", folder, "--seed", "3", "--picture", str(tmp_path / "plan.svg")]) == 0
    out = capsys.readouterr().out
    assert "hazard: falling" in out
    assert "find" in out
    assert "<svg" in (tmp_path / "plan.svg").read_text()
    assert main(["plan", folder, "--seed", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == out.splitlines()[:5]


def test_plan_of_any_trainer_run_says_when_it_knows_too_little(tmp_path, capsys):
    plain_run(tmp_path, save_strategy="steps", save_steps=15)
    assert main(["plan", str(tmp_path)]) == 0
    assert "say too little" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eval_f1", [], "no evaluation with 'eval_loss', so it has no excursions to plan from. It has eval_f1"),
        ("loss", [], "Train with `eval_strategy` set"),
        ("eval_f1", ["--metric", "accuracy"], "no evaluation with 'eval_accuracy'"),
    ],
)
def test_plan_of_a_log_without_evaluations(tmp_path, capsys, name, options, message):
    assert main(["plan", finished(tmp_path / "run", [1.0, 2.0], name=name), *options]) == 2
    assert message in capsys.readouterr().err


def test_plan_of_another_programs_directory(tmp_path, capsys):
    (tmp_path / "events.log").write_text("x")
    assert main(["plan", str(tmp_path)]) == 2
    assert "has no trainer_state.json, nor has a checkpoint in it" in capsys.readouterr().err
    (tmp_path / "trainer_state.json").write_text('{"state": 1}')
    assert main(["plan", str(tmp_path)]) == 2
    assert "another program than Trainer wrote it" in capsys.readouterr().err


def test_help_is_fast():
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "hf_reset.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    assert time.monotonic() - start < 3  # torch alone takes longer to import
