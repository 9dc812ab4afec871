# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes]"]
# ///
"""Do races against the anchor decide as full evaluations do, and how many validation rows do they meet?

    python recipes/studies/racing.py --data_dir ../shared/data

One run with resets is trained on each setting (as `run.py` trains, with evaluations ten steps apart), and the logits
of all validation rows are kept at each evaluation. Then its evaluations are held again as races, in several random
orders: the anchor is where the races put it, and each decision is held against that of the full evaluation of the same
candidate and the same anchor. Rows are counted, not seconds: the machine is shared. A trajectory takes two to eight
minutes of one core and is kept in --trajectories; what is there is not trained again, nor what the results have.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path("recipes/results/studies/racing.json")
BLOCK = 16  # rows
CELLS = {
    "trec-symmetric40, 400 rows": {"dataset": "trec", "validation_rows": 400, "steps": 800, "probability": 0.02},
    "docstrings-symmetric40, 400 rows": {
        "dataset": "docstrings",
        "validation_rows": 400,
        "steps": 800,
        "probability": 0.02,
    },
    "trec-symmetric40, 2000 rows": {"dataset": "trec", "validation_rows": 2000, "steps": 1200, "probability": 0.05},
    "trec-symmetric40, 400 rows, no resets": {
        "dataset": "trec",
        "validation_rows": 400,
        "steps": 800,
        "probability": 0.0,
    },
    "docstrings-symmetric40, 400 rows, no resets": {
        "dataset": "docstrings",
        "validation_rows": 400,
        "steps": 800,
        "probability": 0.0,
    },
    "trec-symmetric40, 2000 rows, no resets": {
        "dataset": "trec",
        "validation_rows": 2000,
        "steps": 1200,
        "probability": 0.0,
    },
    "docstrings-symmetric40, 2000 rows, no resets": {
        "dataset": "docstrings",
        "validation_rows": 2000,
        "steps": 1200,
        "probability": 0.0,
    },
}


def main() -> None:
    """Train what is missing, race, write the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="../shared/data", help="folder of the data sets, one folder each")
    parser.add_argument("--trajectories", default=f"{tempfile.gettempdir()}/racing", help="where logits are kept")
    parser.add_argument("--orders", type=int, default=3, help="random orders of the rows")
    parser.add_argument("--seed", type=int, default=0, help="of the splits, the noise and the training")
    options = parser.parse_args()
    import torch

    from hf_reset.study.cells import complete
    from hf_reset.training.racing import LEVEL

    torch.set_num_threads(1)

    def raced(cell: dict[str, Any]) -> dict[str, Any]:
        kept = trajectory(cell, options)
        return summary([race_through(kept, order) for order in range(cell["orders"])], len(kept["labels"]))

    more = {"seed": options.seed, "orders": options.orders, "level": LEVEL}
    asked = [{"setting": name, **more, **cell} for name, cell in CELLS.items()]
    for record in complete(RESULTS, asked, raced, block=BLOCK):
        print(json.dumps(record))


def trajectory(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Steps (E,), logits (E, N, K) and whether the weights had just been put back (E,); labels (N,)."""
    name = cell["setting"].replace(", ", "-").replace(" ", "-")
    file = Path(options.trajectories) / f"{name}-seed{options.seed}.npz"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **train(cell, options))
    return dict(np.load(file))


def train(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One run with full evaluations, by the parts of `run.py`."""
    import run as study  # a script's own folder is on its path

    from hf_reset.metrics import with_calibrated_loss
    from hf_reset.study.arms import Arm
    from hf_reset.study.comparison import Plan, Run, Setting

    study.quiet()
    chosen = dict(Plan.read(Path(__file__).parent / "plans" / "comparison.yaml").defaults)
    chosen |= {"validation_rows": cell["validation_rows"], "test_rows": 500}
    chosen["training"] = {**chosen["training"], "max_steps": cell["steps"], "eval_steps": 10}
    run = Run(
        Setting(cell["dataset"], "symmetric", 0.4, {}),
        Arm("reset", {"reset_probability": cell["probability"]}),
        options.seed,
    )
    lower, data, known = study.materials(run, chosen, options.data_dir)
    trainer, _ = study.build(run, chosen, lower, data, known)
    steps, logits, put_back, labels = [], [], [], []

    def keep(prediction: Any) -> dict[str, float]:
        step = trainer.state.global_step
        steps.append(step)
        logits.append(np.asarray(prediction.predictions, np.float32))
        labels.append(np.asarray(prediction.label_ids))
        put_back.append(trainer.reset_callback.is_at_anchor(step))
        return study.noisy_figures(prediction)

    trainer.compute_metrics = with_calibrated_loss(keep)
    trainer.train()
    return {"steps": np.array(steps), "logits": np.stack(logits), "put_back": np.array(put_back), "labels": labels[0]}


def race_through(kept: dict[str, Any], order: int) -> list[dict[str, Any]]:
    """Hold each evaluation as `ResetTrainer` would; one record each, of no rows where the anchor's figures answer."""
    from hf_reset.metrics.calibrated import calibrated_loss
    from hf_reset.policy import TURNED
    from hf_reset.training.evidence import Reference, paired_margin
    from hf_reset.training.racing import FULL_EVERY, Race

    labels = kept["labels"]
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    chance = -np.log(counts[codes] / len(labels))
    reference: Reference | None = None
    in_a_row, records = 0, []
    for step, logits, put_back in zip(kept["steps"], kept["logits"], kept["put_back"], strict=True):
        found = calibrated_loss(logits, labels)
        there = Reference(found.rows, labels, {}, found)
        record: dict[str, Any] = {"step": int(step), "rows": len(labels), "full": found.loss, "is_lost": False}
        record |= {"margin": None, "foreseen": None}
        if reference is None:
            reference = there
            records.append({**record, "moved": True, "loss": found.loss})
            continue
        if put_back:
            records.append({**record, "rows": 0, "moved": False, "loss": reference.fit.loss})
            continue
        record["margin"] = paired_margin(found.rows, reference.rows)
        learned = paired_margin(chance, reference.rows)
        differences = found.rows - reference.rows
        if reference.foreseen is not None:
            record["foreseen"] = float(np.corrcoef(reference.foreseen, differences)[0, 1]) ** 2
        if learned is not None and learned >= TURNED and in_a_row + 1 < FULL_EVERY:
            race = Race(reference, is_plain=False, seed=order, step=int(step))
            record["is_lost"] = any(
                race.enter(logits[rows], labels[rows])
                for rows in np.split(race.order, range(BLOCK, len(labels), BLOCK))
            )
            record["rows"] = race.rows
            differences = race.differences()
        in_a_row = in_a_row + 1 if record["is_lost"] else 0
        moved = not record["is_lost"] and found.loss < reference.fit.loss
        reference = there if moved else reference.met(differences)
        records.append({**record, "moved": moved, "loss": reference.fit.loss})
    return records


def summary(races: list[list[dict[str, Any]]], rows: int) -> dict[str, Any]:
    """Over all orders: agreement where the paired difference is clear, and rows against those of full evaluations."""
    every = [record for race in races for record in race]
    candidates = [record for record in every if record["margin"] is not None]
    clear = [record for record in candidates if abs(record["margin"]) > 2]
    wrong = [record for record in clear if record["is_lost"] and record["margin"] < 0]
    worse = [record for record in clear if record["margin"] > 0]
    lost = [record for record in every if record["is_lost"]]
    new = [record for record in every if record["moved"]]
    return {
        "orders": len(races),
        "evaluations": len(races[0]),
        "put_back": sum(record["rows"] == 0 for record in races[0]),
        "clear": len(clear),
        "agreed": len(clear) - len(wrong),
        "better": sum(record["margin"] < 0 for record in clear),
        "new_anchors": len(new) / len(races),
        "factor": rows * len(every) / sum(record["rows"] for record in every),
        "factor_clearly_worse": rows * len(worse) / sum(record["rows"] for record in worse) if worse else math.nan,
        "factor_lost": rows * len(lost) / sum(record["rows"] for record in lost) if lost else math.nan,
        "foreseen": float(np.median([record["foreseen"] for record in candidates if record["foreseen"] is not None])),
        "median_margin": float(np.median([record["margin"] for record in candidates])),
        "last_anchor": float(np.mean([race[-1]["loss"] for race in races])),
        "best": min(record["full"] for record in every),
    }


if __name__ == "__main__":
    main()
