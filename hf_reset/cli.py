"""The command line: what each scope would reset on a model, how to reset next time after a run, what a study found,
and which labels of a file look wrong.

`hf-reset scopes MODEL_DIR`, `hf-reset plan OUTPUT_DIR`, `hf-reset compare DIR`, `hf-reset find-errors DATA`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reset.errors import ConfigError, ResetError, ScopeError
from hf_reset.files import write_atomic, written_whole

if TYPE_CHECKING:
    from torch import nn


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hf-reset", description="Stochastic resetting for Hugging Face Trainer.")
    commands = parser.add_subparsers(dest="command", required=True)
    scopes = commands.add_parser(
        "scopes",
        help="show what each scope selects on a model, with counts and bytes",
        description="Show what each scope selects on a model. Only its configuration is read, no weights.",
    )
    scopes.add_argument("model_dir", metavar="MODEL_DIR", help="a transformers or PEFT adapter directory")
    scopes.add_argument("--scope", action="append", help="a scope to add to the table; may be given again")
    scopes.add_argument("--names", action="store_true", help="list the parameters of each scope")
    plan = commands.add_parser(
        "plan",
        help="recommend probability, patience and evaluation interval from a finished run",
        description="Recommend how to reset next time, from the evaluations of any finished Trainer run.",
    )
    plan.add_argument("output_dir", metavar="OUTPUT_DIR", help="a run's output_dir, or one of its checkpoints")
    plan.add_argument("--metric", help="evaluation result to go by. Default: the run's own for anchors, or eval_loss")
    plan.add_argument(
        "--greater_is_better", action="store_true", default=None, help="its direction, if not by its name"
    )
    plan.add_argument("--min_delta", type=float, default=0.0, help="how much better a new best must be")
    plan.add_argument("--seed", type=int, default=0, help="of the bootstrap behind the ranges")
    plan.add_argument("--picture", metavar="FILE", help="where the picture goes. Default: OUTPUT_DIR/reset_plan.png")
    compare = commands.add_parser(
        "compare",
        help="set the methods of a study beside the best checkpoint of plain training",
        description="Print a study's table, and write it and its figure into its folder.",
    )
    compare.add_argument("folder", metavar="DIR", help="records, such as recipes/results/studies/comparison")
    compare.add_argument("--settings", nargs="+", metavar="NAME", help="columns of the table. Default: all")
    compare.add_argument(
        "--best_of", nargs="+", metavar="ARM", help="a row more: of these methods the one with the best noisy accuracy"
    )
    compare.add_argument(
        "--beside", nargs="+", metavar="ARM", help="hold the others beside these. Default: ours that most columns have"
    )
    _add_find_errors(commands)
    options = parser.parse_args(argv)
    given = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        if options.command == "plan":
            print(plan_report(**given))
        elif options.command == "compare":
            print(comparison_report(options.folder, options.settings, options.best_of, options.beside))
        elif options.command == "find-errors":
            print(errors_report(**given))
        else:
            print(scope_table(options.model_dir, options.scope or [], names=options.names))
    except ResetError as error:
        print(f"hf-reset: {error}", file=sys.stderr)
        return 2
    return 0


def _add_find_errors(commands: Any) -> None:
    find = commands.add_parser(
        "find-errors",
        help="rank the rows of a file of texts by how wrong their label looks",
        description="Fine-tune a classifier with resets on a file's own labels, and rank its rows by how wrong their "
        "label looks. Read the rows before changing any, and never delete rows of a test set by the list. Mistakes "
        "that a model can learn (one class called another by rule) do not show.",
    )
    find.add_argument("data", metavar="DATA", help="a csv, tsv, json, jsonl or parquet file (.gz too)")
    find.add_argument("--text_column", default="text", help="default: text")
    find.add_argument("--label_column", default="label", help="class names or integers. Default: label")
    find.add_argument("--output", metavar="FILE", help="the table, .csv or .parquet. Default: DATA-suspects.csv")
    find.add_argument("--report", metavar="FILE", help=".html or .md. Default: beside the table, as .html")
    find.add_argument("--model", metavar="DIR_OR_NAME", help="default: a small ModernBERT, untrained")
    find.add_argument("--noise_rate", type=float, help="flag at most this share. Default: estimated class by class")
    find.add_argument("--budget", type=int, metavar="N", help="flag at most so many rows, the worst")
    find.add_argument("--steps", type=int, help="default: ten visits of each row, and at least 100 steps")
    find.add_argument("--learning_rate", type=float, help="default: 1e-3; with --model 5e-5")
    find.add_argument("--batch_size", type=int, default=16, help="rows a step. Default: 16")
    find.add_argument("--max_length", type=int, default=128, help="tokens to which texts are cut. Default: 128")
    find.add_argument("--vocab_size", type=int, default=4000, help="of the small model's tokenizer. Default: 4000")
    find.add_argument("--seed", type=int, default=0, help="default: 0")


def errors_report(data: str, *, output: str | None = None, report: str | None = None, **search: Any) -> str:
    """Find suspect labels in a file, write their table and a report, and sum them up.

    Args:
        data: the file.
        output: where the table goes, .csv or .parquet; None: DATA-suspects.csv, beside the data.
        report: where the report goes, .html or .md; None: beside the table, as .html.
        search: fields of `hf_reset.study.find_errors.Search`.

    Raises:
        ConfigError: a suffix that is not offered, or a file that would be written over the data.
        DataError: see `find_errors`.
    """
    from hf_reset.report.suspects import CAUTION, summary_lines, write_suspects_report
    from hf_reset.study.find_errors import Search, find_errors

    source = Path(data)
    table_path = source.with_name(f"{source.name.split('.')[0]}-suspects.csv") if output is None else Path(output)
    report_path = table_path.with_suffix(".html") if report is None else Path(report)
    _check_written(source, table_path, "output", (".csv", ".parquet"))
    _check_written(source, report_path, "report", (".html", ".md"))
    found = find_errors(source, Search(**search))
    with written_whole(table_path) as temporary:
        if table_path.suffix == ".parquet":
            found.table.reset_index().to_parquet(temporary, index=False)
        else:
            found.table.to_csv(temporary)
    facts = {"title": f"Suspect labels in {source.name}", "run": found.run, "notes": found.notes}
    write_suspects_report(report_path, found.table, found.noise, found.names, **facts)
    lines = summary_lines(found.table, found.noise, found.run, found.notes)
    return "\n".join([*lines, CAUTION, f"Table: {table_path}", f"Report: {report_path}"])


def _check_written(data: Path, path: Path, argument: str, suffixes: tuple[str, ...]) -> None:
    """Before training: nothing that took minutes shall be lost to the name of a file."""
    if path.suffix not in suffixes:
        raise ConfigError(f"`{argument}` {str(path)!r} must end in {' or '.join(suffixes)}.")
    if path.absolute() == data.absolute():
        raise ConfigError(f"`{argument}` {str(path)!r} is the data itself. Name another file.")


def comparison_report(
    folder: str,
    settings: Sequence[str] | None = None,
    best_of_arms: Sequence[str] | None = None,
    beside: Sequence[str] | None = None,
) -> str:
    """The tables of a study's records; with its figure they are also written into its folder.

    Args:
        folder: of records, one JSON a run.
        settings: names of the columns; None: all.
        best_of_arms: methods of which a row more takes the one that noisy validation prefers; None: no such row.
        beside: methods beside which every other is held, in two tables each; None: those of this package with a
            record on most columns, or all of them where none has.

    Raises:
        ConfigError: there are no records, or none of a setting that was named, or matplotlib is not installed.
        DataError: fewer than two methods for `best_of_arms`, no run that all of them have, or no record of a method.
    """
    from hf_reset.report.best_of import best_of
    from hf_reset.report.comparison import (
        cells_table,
        choices_table,
        comparison_table,
        last_weights_table,
        settings_of,
        suspects_table,
    )
    from hf_reset.report.comparison_figure import plot_comparison
    from hf_reset.report.rivals import best_rivals_table, ours_on_most, rivals_table
    from hf_reset.study.comparison import read_records

    records = read_records(folder)
    known = settings_of(records)
    if odd := sorted(set(settings or ()) - set(known)):
        raise ConfigError(f"`settings` {odd[0]!r} is not in the study; it has {', '.join(known)}.")
    chosen = list(settings or known)
    records = [record for record in records if record["setting"]["name"] in chosen]
    if best_of_arms is not None:
        records += best_of(records, best_of_arms)
    seeds = len({record["seed"] for record in records})
    ours = list(beside or ours_on_most(records))
    parts = [
        f"Clean test accuracy, mean ± sample standard deviation over {seeds} seeds; the difference is paired by "
        "setting and seed, in points, with a 95 % bootstrap interval.",
        comparison_table(records, chosen),
        f"The last step's weights, nothing chosen:\n\n{last_weights_table(records, chosen)}",
        *(
            f"{arm} beside each other method, on the runs that both have:\n\n{rivals_table(records, arm, chosen)}"
            for arm in ours
        ),
        *(
            f"{arm} beside the rival that is best on a setting:\n\n{best_rivals_table(records, arm, chosen)}"
            for arm in ours
        ),
        cells_table(records),
        "What each figure of noisy validation chose in plain training:",
        choices_table(records),
        "Area under the ROC curve of the suspects against the labels known to be wrong:",
        suspects_table(records, chosen),
    ]
    text = "\n\n".join(parts)
    write_atomic(Path(folder) / "table.md", text + "\n")
    plot_comparison(records, Path(folder) / "comparison.png")
    return text


def plan_report(
    output_dir: str,
    metric: str | None = None,
    *,
    greater_is_better: bool | None = None,
    min_delta: float = 0.0,
    seed: int = 0,
    picture: str | None = None,
) -> str:
    """A recommendation from a finished run, in words, and a picture of what it rests on.

    Args:
        output_dir: of a run that saved a `trainer_state.json`, itself or in a checkpoint.
        metric: evaluation result to go by; None: the one that chose the run's anchors, else "eval_loss".
        greater_is_better: its direction; None: by its name.
        min_delta: how much better a new best must be, in its units.
        seed: of the bootstrap.
        picture: where the picture goes; None: `reset_plan.png` in `output_dir`.

    Raises:
        DataError: there is no log of a Trainer, or no evaluation in it.
        ConfigError: a picture was asked for, and matplotlib is not installed.
    """
    from hf_reset.metrics.directions import greater_is_better as greater_by_name
    from hf_reset.planner.excursions import evaluation_interval, excursions_of, metric_of, read_log
    from hf_reset.planner.recommendation import recommend
    from hf_reset.report.plan import plot_plan, recommendation_text

    history = read_log(output_dir)
    key = metric_of(history) if metric is None else metric if metric.startswith("eval_") else f"eval_{metric}"
    greater = greater_by_name(key) is not False if greater_is_better is None else greater_is_better
    excursions = excursions_of(history, metric=key, greater_is_better=greater, min_delta=min_delta)
    interval = evaluation_interval(history, key)
    advice = recommend(excursions, interval, seed=seed)
    text = recommendation_text(advice, interval, key)
    try:
        drawn = plot_plan(excursions, interval, advice, picture or Path(output_dir) / "reset_plan.png")
    except ModuleNotFoundError:
        if picture is not None:
            raise ConfigError("`--picture` needs matplotlib: pip install 'hf-reset[recipes]'.") from None
        return f"{text}\n(No picture: matplotlib is not installed.)"
    return f"{text}\nPicture: {drawn}"


def scope_table(model_dir: str, more: Sequence[str] = (), *, names: bool = False) -> str:
    """A text table: one row a scope, with tensors, parameters, bytes, and the share of what trains."""
    from hf_reset.anchor.scopes import select_parameters

    model = model_without_weights(model_dir)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = [("scope", "tensors", "parameters", "bytes", "of trainable", "for example")]
    listings = []
    for scope in ["all", "head", "adapters", "peft", "last:1", "last:2", *more]:
        try:
            selected = select_parameters(model, scope)
        except ScopeError as error:
            rows.append((scope, "-", "-", "-", "-", _first_sentence(str(error))))
            continue
        count = sum(p.numel() for p in selected.values())
        size = sum(p.numel() * p.element_size() for p in selected.values())
        share = f"{100 * count / trainable:.1f} %"
        rows.append((scope, str(len(selected)), f"{count:,}", f"{size:,}", share, next(iter(selected))))
        listings += [f"\n{scope}", *(f"  {name}  {tuple(p.shape)}" for name, p in selected.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5)), row[5]]) for row in rows
    ]
    title = f"{type(model).__name__}, {trainable:,} trainable parameters"
    return "\n".join([title, *lines, *(listings if names else [])])


def model_without_weights(model_dir: str) -> nn.Module:
    """The model that a directory's configuration describes, on the meta device; with its adapter, if it is one.

    Raises:
        ScopeError: the directory has no configuration, or one that names no model class.
    """
    directory = Path(model_dir)
    if (directory / "adapter_config.json").is_file():
        return _adapted(directory)
    if not (directory / "config.json").is_file():
        raise ScopeError(
            f"`MODEL_DIR` {model_dir!r} has neither config.json nor adapter_config.json. Name a directory written "
            "by `save_pretrained`."
        )
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ScopeError(f"`MODEL_DIR` {model_dir!r} names the class {name!r}, which transformers does not have.")
    with torch.device("meta"):
        if name == "AutoModel":
            return model_class.from_config(config)
        return model_class._from_config(config)


def _adapted(directory: Path) -> nn.Module:
    import peft
    import torch

    config = peft.PeftConfig.from_pretrained(str(directory))
    base = model_without_weights(config.base_model_name_or_path or "")
    config.inference_mode = False
    with torch.device("meta"):
        return peft.get_peft_model(base, config)  # pyright: ignore[reportArgumentType, reportReturnType]


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].split(": ")[0]


if __name__ == "__main__":
    sys.exit(main())
