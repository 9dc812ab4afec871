# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes]"]
# ///
"""Do resets ever hold a run below where plain training ends? A grid of small, slow and badly validated runs.

    python recipes/studies/never_locked_in.py

A small BERT from scratch tells classes by the words of a bag, 40 % of its labels wrong. The fewer the validation rows,
the closer the evaluations and the higher the probability, the easier resets begin on a fluctuation, near chance, and
stay there. For each cell: plain training's last weights, and those of a run with resets (default arming, and the
`patience` of two evaluations that used to be the default), on 1 000 clean test rows. What the results file has is
skipped.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path("recipes/results/studies/never_locked_in.json")
CLASSES, WORDS, LENGTH, TEST = 4, 200, 16, 1000
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"reset_probability": 0.0},
    "reset, r 0.02": {"reset_probability": 0.02},
    "reset, r 0.1": {"reset_probability": 0.1},
    "reset, r 0.1, patience 2": {"reset_probability": 0.1, "reset_patience": 2},
}
CELLS = [
    {"rows": 300, "validation": 40, "every": 10, "rate": 5e-4},
    {"rows": 350, "validation": 42, "every": 25, "rate": 1e-3},
    {"rows": 800, "validation": 200, "every": 10, "rate": 5e-4},
    {"rows": 800, "validation": 100, "every": 20, "rate": 1e-3},
    {"rows": 1500, "validation": 400, "every": 20, "rate": 1e-3},
    {"rows": 2000, "validation": 40, "every": 10, "rate": 1e-3},
    {"rows": 2000, "validation": 400, "every": 10, "rate": 5e-4},
    {"rows": 2000, "validation": 400, "every": 40, "rate": 1e-3},
]


def main() -> None:
    """Run what the results file lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the results file")
    parser.add_argument("--metric", default="eval_calibrated_loss", help="what chooses anchors")
    options = parser.parse_args()
    import torch

    from hf_reset.study.cells import complete

    torch.set_num_threads(1)
    asked = [
        {**cell, "arm": arm, "seed": seed, "steps": options.steps, "metric": options.metric}
        for cell, seed, arm in itertools.product(CELLS, options.seeds, ARMS)
    ]
    print(table(complete(options.results, asked, lambda cell: run(**cell), arms=ARMS)))


def bags(count: int, seed: int) -> tuple[Any, Any]:
    """Word numbers (N, LENGTH), three in ten from the class's own twenty words; and true classes (N,)."""
    import numpy as np

    own = np.random.default_rng(99).permutation(WORDS)[: 20 * CLASSES].reshape(CLASSES, 20)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    words = rng.integers(0, WORDS, (count, LENGTH))
    chosen = own[labels[:, None], rng.integers(0, 20, (count, LENGTH))]
    return np.where(rng.random((count, LENGTH)) < 0.3, chosen, words), labels


def rows_of(words: Any, labels: Any) -> Any:
    """As a data set."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": words.tolist(), "labels": labels.tolist()})


def run(*, rows: int, validation: int, every: int, rate: float, arm: str, seed: int, steps: int, metric: str) -> dict:
    """One run; the clean accuracy of its last weights, and of those that it finishes with."""
    import numpy as np
    from transformers import BertConfig, BertForSequenceClassification, set_seed
    from transformers.utils import logging

    from hf_reset import ResetTrainer, ResetTrainingArguments

    logging.set_verbosity_error()
    words, true = bags(rows + validation, seed)
    rng = np.random.default_rng(1000 + seed)
    given = np.where(rng.random(len(true)) < 0.4, (true + rng.integers(1, CLASSES, len(true))) % CLASSES, true)
    test, truth = bags(TEST, 10_000 + seed)
    args = ResetTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=200,
        learning_rate=rate,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
        reset_metric=metric,
        reset_finish="last",
        **ARMS[arm],
    )
    set_seed(seed)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        id2label={label: str(label) for label in range(CLASSES)},
    )
    trainer = ResetTrainer(
        BertForSequenceClassification(config),
        args,
        train_dataset=rows_of(words[:rows], given[:rows]),
        eval_dataset=rows_of(words[rows:], given[rows:]),
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    callback = trainer.reset_callback
    assert callback is not None
    last = accuracy(trainer, rows_of(test, truth))
    record = {"last": last, "finish": last, "resets": callback.reset_state.resets}
    record |= {"armed_step": callback.reset_state.armed_step, "anchor_step": callback.reset_state.anchor_step}
    if callback.store is not None and callback.store.is_set:
        with callback.store.swapped():
            record["finish"] = accuracy(trainer, rows_of(test, truth))
    return record


def accuracy(trainer: Any, test: Any) -> float:
    """Of the live weights."""
    trainer.compute_metrics = None
    found = trainer.predict(test)
    return float((found.predictions.argmax(-1) == found.label_ids).mean())


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row a cell; how many standard errors (of the paired difference over seeds) below plain's last."""
    from hf_reset.report.tables import markdown_table, mean_and_sd

    keys = ("rows", "validation", "every", "rate")
    lines = []
    for cell in dict.fromkeys(tuple(record[key] for key in keys) for record in records):
        of_cell = [record for record in records if tuple(record[key] for key in keys) == cell]
        line = [str(value) for value in cell]
        for arm in ARMS:
            spread = mean_and_sd([record["last"] for record in of_cell if record["arm"] == arm])
            finish = mean_and_sd([record["finish"] for record in of_cell if record["arm"] == arm])
            if spread is None or finish is None:
                line.append("–")
            else:
                resets = sum(record["resets"] for record in of_cell if record["arm"] == arm)
                deviation = "" if spread[1] is None else f" ± {spread[1]:.3f}"
                line.append(f"{spread[0]:.3f}{deviation}; anchor {finish[0]:.3f} ({resets} resets)")
        lines.append(line)
    return markdown_table(["training rows", "validation rows", "evaluation every", "learning rate", *ARMS], lines)


if __name__ == "__main__":
    main()
