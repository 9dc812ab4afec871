"""Metrics: against scikit-learn and counting by hand; offline, without files, several processes at once."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import f1_score

from hf_reset.errors import DataError
from hf_reset.metrics import Accuracy, LabelMemory, MacroF1, accuracy, label_memory, macro_f1


@pytest.fixture(params=range(4))
def labels(request):
    rng = np.random.default_rng(request.param)
    classes = [2, 3, 8, 40][request.param]  # with 40 classes and 60 rows, some occur on one side only
    return rng.integers(classes, size=60), rng.integers(classes, size=60)


def test_macro_f1_is_scikit_learns(labels):
    predictions, references = labels
    expected = f1_score(references, predictions, average="macro", zero_division=0.0)
    assert macro_f1(predictions, references) == pytest.approx(expected, abs=1e-12)


def test_macro_f1_weighs_classes_alike():
    # Class 0: 9 of 9 found, with one false positive; class 1: its one row missed.
    assert macro_f1([0] * 10, [0] * 9 + [1]) == pytest.approx((18 / 19 + 0) / 2)
    assert accuracy([0] * 10, [0] * 9 + [1]) == 0.9


def test_label_memory_counts_mislabelled_rows_only():
    #           right, right, |  wrong  wrong  clean  other
    predictions = [0, 9, 1, 1, 0, 2]
    references = [0, 1, 1, 1, 1, 1]
    clean = [0, 1, 0, 0, 0, 0]
    assert label_memory(predictions, references, clean) == {
        "memory/wrong": 0.5,
        "memory/clean": 0.25,
        "memory/other": 0.25,
    }


@pytest.mark.parametrize("metric", [Accuracy, MacroF1])
def test_modules_equal_functions_in_one_call_or_in_batches(metric, labels):
    predictions, references = labels
    function = {Accuracy: accuracy, MacroF1: macro_f1}[metric]
    whole = metric().compute(predictions=predictions, references=references)
    batched = metric()
    for start in range(0, 60, 7):
        rows = slice(start, start + 7)
        batched.add_batch(predictions=predictions[rows], references=references[rows])
    assert whole == batched.compute() == {next(iter(whole)): function(predictions, references)}


def test_label_memory_module_can_be_used_again():
    metric = LabelMemory()
    for predictions, wrong in ([[1, 1], 1.0], [[0, 1], 0.5]):
        result = metric.compute(predictions=predictions, references=[1, 1], clean_labels=[0, 0])
        assert result is not None
        assert result["memory/wrong"] == wrong


def test_errors_name_what_is_wrong():
    with pytest.raises(DataError, match=r"`predictions` \(2,\), `references` \(1,\)"):
        accuracy([0, 1], [0])
    with pytest.raises(DataError, match="at least one row"):
        macro_f1([], [])
    with pytest.raises(DataError, match="no mislabelled row"):
        label_memory([0], [1], [1])
    with pytest.raises(DataError, match="no mislabelled row"):
        LabelMemory().compute(predictions=[0], references=[1], clean_labels=[1])


USE = """
import os, evaluate
from hf_reset.metrics import Accuracy, LabelMemory
metric = Accuracy()
metric.add_batch(predictions=[0, 1], references=[0, 0])
other = Accuracy()  # at work at the same time in the same process
other.add_batch(predictions=[1], references=[1])
assert metric.compute() == {"accuracy": 0.5} and other.compute() == {"accuracy": 1.0}
both = evaluate.combine([Accuracy(), Accuracy()])
assert not os.path.exists(os.environ["HF_HOME"]), os.listdir(os.environ["HF_HOME"])
"""


def test_no_network_and_no_files_in_several_processes(tmp_path, monkeypatch):
    # A cache directory under a file cannot be made, whoever tries.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("HF_METRICS_CACHE", str(tmp_path / "file" / "metrics"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = [subprocess.Popen([sys.executable, "-c", USE], stderr=subprocess.PIPE) for _ in range(2)]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


def test_functions_do_not_import_evaluate():
    code = "import sys; from hf_reset.metrics import label_memory; assert 'evaluate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
