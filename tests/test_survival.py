"""The short form of recipes/benchmarks/survival.py: nine SIGKILLs over one process, DDP and FSDP2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "recipes" / "benchmarks" / "survival.py"


@pytest.mark.distributed
def test_every_killed_run_resumes_and_ends_bit_identical(tmp_path):
    command = [sys.executable, str(HARNESS), "--kills", "9", "--seed", "1", "--results", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    record = json.loads((tmp_path / "survival.json").read_text())
    assert [life["identical"] for life in record["lives"]] == [True, True, True]
    assert {life["mode"] for life in record["lives"]} == {"single", "ddp2", "fsdp2"}
    assert len(record["kills"]) == 9
    assert any(kill["resumed_from"] > 0 for kill in record["kills"])
