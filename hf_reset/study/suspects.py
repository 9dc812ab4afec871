"""The training rows whose label or response a run trusts least: for its record, and as a table in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_reset.errors import DataError
from hf_reset.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd

    from hf_reset.study.classification import ClassificationData
    from hf_reset.study.instructions import InstructionData
    from hf_reset.training.trainer import ResetTrainer

FILE_NAME = "suspects.csv"
_SHOWN = 10


def suspects_found(trainer: ResetTrainer, data: ClassificationData) -> dict[str, object]:
    """What a run says of its training labels; all rows go to `suspects.csv` in its output folder.

    Args:
        trainer: after training.
        data: what it was trained on.

    Returns:
        `most_suspect`: the ten rows of lowest label quality, the worst first, each with `row`, `text`, `given`,
        `predicted`, `label_quality` and, where it is known, `is_wrong`. `suspects_auroc`: area under the ROC curve of
        the label quality against the labels known to be wrong; None where none is, or all are. Empty where the run
        judged no row.
    """
    try:
        table = trainer.suspects()
    except DataError:
        return {}
    rows, names = data.train, dict(enumerate(data.names))
    table.insert(0, "text", list(rows["text"]))
    for name in ("given", "predicted"):
        table.insert(1, name, table[f"{name}_label"].map(names))
    table = table.drop(columns=["given_label", "predicted_label"])
    is_wrong = list(rows["is_mislabelled"]) if len(data.mislabelled) else None
    return _found(trainer, table, is_wrong, ["text", "given", "predicted"])


def responses_found(trainer: ResetTrainer, data: InstructionData, rows: Sequence[int]) -> dict[str, object]:
    """What a run says of its training responses, as `suspects_found` does: with `prompt` and `response`.

    Args:
        trainer: after training; only one that refines keeps a memory of responses.
        data: what it was trained on.
        rows: the row of `data.train` that each row of the trainer's set is.
    """
    try:
        table = trainer.suspects()
    except DataError:
        return {}
    kept = data.train.select(rows)
    table.insert(0, "prompt", [messages[-1]["content"] for messages in kept["prompt"]])
    table.insert(1, "response", list(kept["response"]))
    table = table.set_axis(list(rows), axis="index")
    is_wrong = list(kept["is_corrupted"]) if len(data.corrupted) else None
    return _found(trainer, table, is_wrong, ["prompt", "response"])


def _found(
    trainer: ResetTrainer, table: pd.DataFrame, is_wrong: Sequence[bool] | None, shown: Sequence[str]
) -> dict[str, object]:
    if is_wrong is not None:
        table["is_wrong"] = is_wrong
    table = table.sort_values("label_quality")
    if trainer.args.should_save:
        write_atomic(Path(trainer.args.output_dir or "") / FILE_NAME, table.to_csv(index_label="row"))
    shown = ["row", *shown, "label_quality", *([] if is_wrong is None else ["is_wrong"])]
    judged = table.loc[table["rank"].notna()]
    worst = judged.head(_SHOWN).rename_axis("row").reset_index()
    return {"most_suspect": worst[list(shown)].to_dict("records"), "suspects_auroc": _auroc(judged)}


def _auroc(judged: pd.DataFrame) -> float | None:
    from sklearn.metrics import roc_auc_score

    if "is_wrong" not in judged or judged["is_wrong"].nunique() < 2:
        return None
    return float(roc_auc_score(judged["is_wrong"], 1 - judged["label_quality"]))
