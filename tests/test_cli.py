"""`hf-reset scopes MODEL_DIR`."""

import subprocess
import sys
import time

import peft
from tiny import bert

from hf_reset.cli import main


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


def test_help_is_fast():
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "hf_reset.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    assert time.monotonic() - start < 3  # torch alone takes longer to import
