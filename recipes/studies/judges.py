# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes]"]
# ///
"""Which figure of noisy validation chooses best, alone or averaged with the evaluation before (`ResetConfig.smooth`)?

    python recipes/studies/judges.py --data_dir ../shared/data

On dolly's 3 000 instructions and their eight categories, which no table has. One run a cell trains as `run.py` does,
and the logits of validation and of the clean test are kept at each evaluation (a minute of one core each; what is in
--trajectories is not trained again). Then each judge chooses among the evaluations, by the product's own rule, and what
it gives away is the clean accuracy of the run's best evaluation less that of its choice. Looking at every evaluation's
test accuracy is what this data set is set apart for.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path("recipes/results/studies/judges.json")
NOISE = [("pair", 0.4), ("symmetric", 0.4), ("symmetric", 0.6), ("pair", 0.3), ("symmetric", 0.0)]
ARMS = {
    "plain": {},
    "reset + refine": {"reset_probability": 0.02, "reset_refine": "soft", "reset_ema_decay": 0.0},
    "reset + refine + ema": {"reset_probability": 0.02, "reset_refine": "soft", "reset_ema_decay": 0.98},
}
JUDGES = ("loss", "accuracy", "calibrated")


def main() -> None:
    """Train what is missing, let every judge choose, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="../shared/data", help="folder of the data sets, one folder each")
    parser.add_argument("--trajectories", default=f"{tempfile.gettempdir()}/judges", help="where logits are kept")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="of the splits, the noise and the training"
    )
    parser.add_argument("--kept", action="store_true", help="train nothing, judge the trajectories that are there")
    options = parser.parse_args()
    import torch

    from hf_reset.study.cells import complete

    torch.set_num_threads(1)
    cells = [
        {"noise_kind": kind, "noise_rate": rate, "arm": arm, "seed": seed}
        for seed, (kind, rate), arm in itertools.product(options.seeds, NOISE, ARMS)
    ]
    if options.kept:
        cells = [cell for cell in cells if trajectory_file(cell, options).is_file()]
    print(table(complete(RESULTS, cells, lambda cell: judged(trajectory(cell, options)), dataset="dolly_3k")))


def run_of(cell: dict[str, Any]) -> Any:
    """A cell as a run of `run.py`."""
    from hf_reset.study.arms import Arm
    from hf_reset.study.comparison import Run, Setting

    setting = Setting("dolly_3k", cell["noise_kind"], cell["noise_rate"])
    return Run(setting, Arm(cell["arm"], ARMS[cell["arm"]]), cell["seed"])


def trajectory_file(cell: dict[str, Any], options: argparse.Namespace) -> Path:
    """Where a cell's logits are kept."""
    return Path(options.trajectories) / f"{run_of(cell).name}.npz"


def trajectory(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Logits of validation (E, N, K) and of the test (E, M, K) at each evaluation; labels (N,) and truth (M,)."""
    file = trajectory_file(cell, options)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **train(run_of(cell), options))
    return dict(np.load(file))


def train(run: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One run, by the parts of `run.py`."""
    import run as study  # a script's own folder is on its path
    import torch

    from hf_reset.metrics import with_calibrated_loss
    from hf_reset.study.comparison import Plan
    from hf_reset.study.tail import pad_states

    study.quiet()
    chosen = dict(Plan.read(Path(__file__).parent / "plans" / "comparison.yaml").defaults) | {"test_rows": 596}
    lower, data, known = study.materials(run, chosen, options.data_dir)
    trainer, _ = study.build(run, chosen, lower, data, known)
    test = study.rows_of(data.test, known, "clean_label")
    kept: dict[str, Any] = {"val": [], "test": [], "truth": np.array(test.labels)}

    def keep(prediction: Any) -> dict[str, float]:
        kept["val"].append(np.asarray(prediction.predictions, np.float32))
        kept["labels"] = np.asarray(prediction.label_ids)
        found = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # amid the evaluation, so of the weights it is of
            for start in range(0, len(test), 128):
                batch = pad_states([test[row] for row in range(start, min(start + 128, len(test)))])
                batch.pop("labels")
                found.append(trainer.model(**batch).logits.float().numpy())
        kept["test"].append(np.concatenate(found))
        return study.noisy_figures(prediction)

    trainer.compute_metrics = with_calibrated_loss(keep)
    trainer.train()
    return {**kept, "val": np.stack(kept["val"]), "test": np.stack(kept["test"])}


def judged(kept: dict[str, Any]) -> dict[str, Any]:
    """The clean accuracy of the best evaluation and the last, and of each judge's choice."""
    from hf_reset.config import ResetConfig
    from hf_reset.policy import ResetState, observe

    clean = (kept["test"].argmax(-1) == kept["truth"]).mean(1)
    figures = figures_of(kept["val"], kept["labels"])
    chosen: dict[str, float] = {}
    for judge, smooth in itertools.product(JUDGES, (False, True)):
        state, config = ResetState(), ResetConfig(probability=0.0, smooth=smooth)
        for step, value in enumerate(figures[judge]):
            state, _ = observe(config, state, value, step, greater_is_better=judge == "accuracy")
        chosen[judge + (", smooth" if smooth else "")] = round(float(clean[state.anchor_step]), 6)
    return {"best": round(float(clean.max()), 6), "last": round(float(clean[-1]), 6), "chosen": chosen}


def figures_of(logits: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """Each judge's value of each evaluation."""
    from scipy.special import log_softmax

    from hf_reset.metrics import calibrated_loss

    figures: dict[str, list[float]] = {judge: [] for judge in JUDGES}
    for z in logits.astype(np.float64):
        figures["loss"].append(float(-log_softmax(z, -1)[np.arange(len(labels)), labels].mean()))
        figures["accuracy"].append(float((z.argmax(-1) == labels).mean()))
        figures["calibrated"].append(calibrated_loss(z, labels).loss)
    return figures


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: what each judge gives away, in points of clean accuracy, by arm."""
    from hf_reset.report.tables import markdown_table

    rows = []
    arms = list(dict.fromkeys(record["arm"] for record in records))
    for judge in records[0]["chosen"]:
        lost = {
            arm: [100 * (one["best"] - one["chosen"][judge]) for one in records if one["arm"] == arm] for arm in arms
        }
        every = [value for values in lost.values() for value in values]
        error = statistics.stdev(every) / len(every) ** 0.5
        cells = [f"{statistics.fmean(lost[arm]):.1f} ({len(lost[arm])} runs)" for arm in arms]
        rows.append([str(judge), *cells, f"{statistics.fmean(every):.1f} ± {error:.1f}", f"{max(every):.1f}"])
    return markdown_table(["chosen by", *arms, "all, ± one standard error", "worst run"], rows)


if __name__ == "__main__":
    main()
