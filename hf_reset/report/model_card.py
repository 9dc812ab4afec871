"""The card of a saved model: data, noise, what chose the weights, resets, suspects' share, and the validation curve.

Metadata are those that a hub reads (model-index), so that results show beside the model; the text is for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reset.files import write_atomic
from hf_reset.report.tables import Column, Record, format_spread, markdown_table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_MEASURES = (
    (Column("test_accuracy_last", "Clean test accuracy, last step's weights"), "accuracy"),
    (Column("test_accuracy_best", "Clean test accuracy, best evaluated weights"), "accuracy"),
    (Column("test_macro_f1_last", "Clean test macro-F1, last step's weights"), "f1"),
    (Column("test_macro_f1_best", "Clean test macro-F1, best evaluated weights"), "f1"),
)
_POINTS = 12  # of the curve
_TAGS = ["hf-reset", "stochastic-resetting", "noisy-labels", "text-classification"]


def write_model_card(
    folder: str | Path,
    records: Sequence[Record],
    *,
    title: str,
    chosen_by: str,
    base_model: str | None = None,
    adapters: bool = False,
    saved: str = "anchor",
) -> Path:
    """Write `README.md` into a saved classifier's folder, in place of what lies there.

    Args:
        folder: of the model or its adapters.
        records: of runs that differ in their seed, the saved one's first. Of several, measures are given as mean ±
            sample standard deviation over them.
        title: data and noise, in a line.
        chosen_by: which validation labels chose the weights, in a sentence or two.
        base_model: what was fine-tuned, on the hub or a local directory; None: a model built from its config.
        adapters: the folder holds PEFT adapters.
        saved: "anchor", or "last" for the last step's weights.

    Returns:
        The card's path.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = Path(folder).absolute().parent.name or "model"
    results = evaluations(records, title)
    # A path on the machine that trained says nothing elsewhere.
    on_hub = base_model if base_model is not None and not Path(base_model).exists() else None
    data = ModelCardData(
        model_name=name,
        base_model=on_hub,
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-classification",
        tags=[*_TAGS, "lora"] if adapters else _TAGS,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
    )
    text = card_text(records, name=name, title=title, chosen_by=chosen_by, base_model=_named(base_model), saved=saved)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    return write_atomic(Path(folder) / "README.md", str(card))


def evaluations(records: Sequence[Record], title: str) -> list[EvalResult]:
    """Results as a hub reads them: a number of one run, "0.912 ± 0.012" of several; those not measured are left out.

    Args:
        records: of runs of one arm.
        title: data and noise, in a line.
    """
    from huggingface_hub import EvalResult

    found = []
    for column, metric in _MEASURES:
        values = [record[column.key] for record in records if record.get(column.key) is not None]
        if values:
            found.append(
                EvalResult(
                    task_type="text-classification",
                    task_name="Text classification",
                    dataset_type="custom",
                    dataset_name=title,
                    dataset_split="test",
                    metric_type=metric,
                    metric_name=column.heading,
                    metric_value=float(values[0]) if len(values) == 1 else format_spread(values, column),
                )
            )
    return found


def card_text(
    records: Sequence[Record],
    *,
    name: str,
    title: str,
    chosen_by: str,
    base_model: str,
    saved: str = "anchor",
) -> str:
    """The card without its metadata; `name` is the run's, the other arguments as those of `write_model_card`."""
    first = records[0]
    told = {"Fine-tuned from": base_model, "Data and labels": title, **_noise(first), **_resets(first)}
    told["Weights saved"] = "the anchor's, the best by validation" if saved == "anchor" else "the last step's"
    lines = [f"- **{name}:** {value}" for name, value in told.items() if value is not None]
    measured = [[column.heading, format_spread(values, column)] for column, values in _measured(records)]
    seeds = f"Mean ± sample standard deviation over {len(records)} seeds." if len(records) > 1 else "One seed."
    parts = [
        f"# {title}",
        f"A text classifier, trained with hf_reset: stochastic resetting for noisy labels. Run {name!r}.",
        "\n".join(lines),
        f"**What chose the anchor:** {chosen_by}",
        "## Results",
        markdown_table(["measure", "value"], measured) if measured else "Nothing was measured.",
        f"{seeds} The test was read once, after training.",
    ]
    curve = first.get("history", {}).get("validation_loss", [])
    if curve:
        rows = [[str(step), f"{value:.4f}"] for step, value in thinned(curve, first.get("best_step"))]
        parts += ["## Validation", markdown_table(["step", "validation loss"], rows)]
    return "\n\n".join(parts) + "\n"


def thinned(curve: Sequence[Sequence[float]], best_step: int | None = None) -> list[tuple[int, float]]:
    """At most a dozen points of a curve, evenly spread, its ends among them, and the best one besides.

    Args:
        curve: (step, value) in order.
        best_step: a step to keep; None for none.
    """
    last = len(curve) - 1
    kept = {round(last * place / (_POINTS - 1)) for place in range(_POINTS)} if last > _POINTS else set(range(last + 1))
    kept |= {index for index, (step, _) in enumerate(curve) if step == best_step}
    return [(int(curve[index][0]), float(curve[index][1])) for index in sorted(kept)]


def _measured(records: Sequence[Record]) -> list[tuple[Column, list[float]]]:
    of = [(column, [r[column.key] for r in records if r.get(column.key) is not None]) for column, _ in _MEASURES]
    return [(column, values) for column, values in of if values]


def _noise(record: Record) -> dict[str, Any]:
    rows, wrong = record.get("train_rows"), record.get("train_mislabelled")
    if rows is None:
        return {}
    known = f", {wrong} of them ({wrong / rows:.0%}) with a label known to be wrong" if wrong else ""
    share = record.get("suspects_share")
    told = {"Training rows": f"{rows}{known}"}
    return told if share is None else {**told, "Suspect labels": f"{share:.0%} of the training rows, by this run"}


def _resets(record: Record) -> dict[str, Any]:
    best = record.get("best_step")
    steps = f"{record.get('steps')}, the best evaluation at step {best}" if best is not None else record.get("steps")
    told = record.get("resets") if record.get("can_reset") else "none (an arm without)"
    return {"Optimizer steps": steps, "Resets": told}


def _named(base_model: str | None) -> str:
    if base_model is None:
        return "a small ModernBERT built from its config, untrained"
    return Path(base_model).name if Path(base_model).exists() else base_model
