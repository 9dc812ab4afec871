"""The command line: what each scope would reset on a model, and how to reset next time after a run,
and what a study found.

`hf-reset scopes MODEL_DIR`, `hf-reset plan OUTPUT_DIR`, `hf-reset compare DIR`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_reset.errors import ConfigError, ResetError, ScopeError

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
    options = parser.parse_args(argv)
    try:
        if options.command == "plan":
            print(plan_report(**{name: value for name, value in vars(options).items() if name != "command"}))
        elif options.command == "compare":
            print(comparison_report(options.folder, options.settings))
        else:
            print(scope_table(options.model_dir, options.scope or [], names=options.names))
    except ResetError as error:
        print(f"hf-reset: {error}", file=sys.stderr)
        return 2
    return 0


def comparison_report(folder: str, settings: Sequence[str] | None = None) -> str:
    """The tables of a study's records; with its figure they are also written into its folder.

    Args:
        folder: of records, one JSON a run.
        settings: names of the columns; None: all.

    Raises:
        ConfigError: there are no records, or none of a setting that was named, or matplotlib is not installed.
    """
    from hf_reset.files import write_atomic
    from hf_reset.report.comparison import comparison_table, plot_comparison, settings_of, suspects_table
    from hf_reset.study.comparison import read_records

    records = read_records(folder)
    known = settings_of(records)
    if odd := sorted(set(settings or ()) - set(known)):
        raise ConfigError(f"`settings` {odd[0]!r} is not in the study; it has {', '.join(known)}.")
    chosen = list(settings or known)
    records = [record for record in records if record["setting"]["name"] in chosen]
    seeds = len({record["seed"] for record in records})
    parts = [
        f"Clean test accuracy, mean ± sample standard deviation over {seeds} seeds; the difference is paired by "
        "setting and seed, in points, with a 95 % bootstrap interval.",
        comparison_table(records, chosen),
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
    from hf_reset.planner.excursions import evaluation_interval, excursions_of, metric_of, read_log
    from hf_reset.planner.plan import recommend
    from hf_reset.report.plan import plot_plan, recommendation_text

    history = read_log(output_dir)
    key = metric_of(history) if metric is None else metric if metric.startswith("eval_") else f"eval_{metric}"
    greater = not key.endswith("loss") if greater_is_better is None else greater_is_better
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
