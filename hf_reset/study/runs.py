"""What the recipes share about being run: options, files of data, and the loop over arms and seeds.

Kept free of torch, so that ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from hf_reset.errors import ConfigError, DataError, ResetError
from hf_reset.report.results import plain

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback, TrainingArguments

    from hf_reset.report.results import Results
    from hf_reset.training.best_weights import BestWeightsCallback

_FORMATS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def option(default: Any, text: str) -> Any:
    """A field of a recipe's dataclass, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class RecipeArguments:
    """Options that every recipe has: the study, and where rows come from. Those of the trainer come on top."""

    # study
    compare: bool = option(False, "Run a plain and a reset arm from the same seeds.")
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds of data order, noise, new weights and training; one run an arm each."},
    )
    save_model: bool = option(True, "Keep each run's final model (or adapters) in OUTPUT_DIR/ARM-seedN/model.")
    # rows
    dataset_name: str | None = option(None, "Data set on the hub, or a local directory. Default: the embedded corpus.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_file: str | None = option(None, "Local csv, tsv, json, jsonl or parquet file (.gz too) in its place.")
    validation_file: str | None = option(None, "Rows to choose anchors on. Default: some of the training rows.")
    test_file: str | None = option(None, "Rows to measure on, once, at the end. Default: some of the training rows.")
    validation_fraction: float = option(0.15, "Share of training rows taken for validation where none is given.")
    test_fraction: float = option(0.15, "Share of training rows taken for the test where none is given.")
    max_train_samples: int | None = option(None, "At most so many training rows.")
    max_eval_samples: int | None = option(None, "At most (where taken from training, exactly) so many validation rows.")
    max_predict_samples: int | None = option(None, "Likewise for the test.")


def run_command(
    run: Callable[[Sequence[str]], Any], recipe_arguments: type, *, description: str, argv: Sequence[str] | None = None
) -> None:
    """Be the command of a recipe: its help, an error in one line with exit status 1, a clean end of all processes.

    Args:
        run: the recipe, from its command line.
        recipe_arguments: the recipe's dataclass.
        description: the recipe's docstring.
        argv: the command line without the script's name; None: that of this process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if show_help(argv, recipe_arguments, description=description):
        return
    try:
        run(argv)
    except ResetError as error:
        sys.exit(f"error: {error}")
    from hf_reset.anchor.ranks import end_process_group

    end_process_group()


class _Parser(HfArgumentParser):
    """HfArgumentParser which raises what argparse would print and exit with, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See --help.")


def show_help(argv: Sequence[str], recipe_arguments: type, *, description: str) -> bool:
    """Answer ``-h`` or ``--help`` from the recipe's own options alone, before torch is imported.

    Args:
        argv: the command line without the script's name.
        recipe_arguments: the recipe's dataclass.
        description: the recipe's docstring.

    Returns:
        Whether help was asked for (and printed).
    """
    if not {"-h", "--help"} & set(argv):
        return False
    parser = HfArgumentParser(
        recipe_arguments,  # type: ignore[arg-type]
        description=description,
        epilog="Every field of transformers.TrainingArguments and every reset_* field of "
        "hf_reset.ResetTrainingArguments is an option too; --help_all lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config_option(parser)
    parser.print_help()
    return True


def parse_recipe(argument_classes: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """Options of a recipe: from ``--config FILE.yaml``, overridden by those on the command line.

    Args:
        argument_classes: dataclasses whose fields are the options.
        argv: the command line without the script's name.

    Returns:
        One instance of each class, in order; then the configuration, JSON-plain, for ``results.json``: all that
        was given, all fields of the first class, and all ``reset_*`` fields.

    Raises:
        ConfigError: an option is unknown (the nearest known one is named), or has a value it cannot have; the
            configuration file is missing or is not a mapping.
    """
    parser = _Parser(argument_classes, allow_abbrev=False)  # type: ignore[arg-type]
    _add_config_option(parser)
    parser.add_argument("--help_all", action="help", help="list every option and exit")
    known = {one.name for cls in argument_classes for one in fields(cls) if one.init}
    early, _ = _config_parser().parse_known_args(argv)
    from_file = [] if early.config is None else _as_options(read_config(early.config, known))
    *parsed, rest = parser.parse_args_into_dataclasses(
        [*from_file, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ConfigError(f"option {rest[0]!r} is not known{_nearest(rest[0].lstrip('-'), known)}. See --help.")
    instances = parsed[: len(argument_classes)]
    return (*instances, _configuration(instances, given=_option_names([*from_file, *argv]) & known))


def given_option(argv: Sequence[str], name: str, *, default: str) -> str:
    """One option, as given on the command line or in the configuration file, before the others are parsed.

    Args:
        argv: the command line without the script's name.
        name: of the option.
        default: where it is not given.
    """
    early = _config_parser()
    early.add_argument(f"--{name}")
    words, _ = early.parse_known_args(argv)
    given = getattr(words, name)
    if given is None and words.config is not None:
        given = read_config(words.config).get(name)
    return default if given is None else str(given)


def read_config(path: str | Path, known: set[str] | None = None) -> dict[str, Any]:
    """A YAML configuration as a mapping of option to value.

    Args:
        path: the file.
        known: the names that options may have; None: any.

    Raises:
        ConfigError: the file is missing, is not a mapping, or holds an unknown key (the nearest is named).
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"`config` {str(path)!r} cannot be read ({error}). Give a YAML file.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"`config` {str(path)!r} must hold `option: value` lines, got {type(content).__name__}.")
    for key in content:
        if known is not None and key not in known:
            raise ConfigError(f"`config` {str(path)!r} has the unknown key {key!r}{_nearest(str(key), known)}.")
    return content


def planned_runs(seeds: Sequence[int], *, compare: bool, resets: bool) -> list[tuple[str, int]]:
    """The (arm, seed) pairs of a study: both arms from each seed under ``compare``, else the one asked for.

    Args:
        seeds: one run an arm each; at least one, none twice.
        compare: run ``plain`` and ``reset``.
        resets: without ``compare``, whether the arm is ``reset`` (its probability is above 0) or ``plain``.

    Raises:
        ConfigError: no seed, or one twice; ``compare`` without resets.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"`seeds` must name at least one seed and none twice, got {list(seeds)}.")
    if compare and not resets:
        raise ConfigError("`compare` with `reset_probability` 0 sets plain beside plain. Give a reset_probability.")
    arms = ("plain", "reset") if compare else ("reset",) if resets else ("plain",)
    return [(arm, seed) for seed in seeds for arm in arms]


def open_study(
    recipe: str, options: RecipeArguments, training: Any, configuration: dict[str, Any]
) -> tuple[Results, list[tuple[str, int]], Callable[[str], None]]:
    """Where a study keeps its records, the runs it consists of, and how it tells of its progress (on one process).

    Args:
        recipe: its name.
        options: the recipe's.
        training: the trainer's arguments.
        configuration: see :func:`parse_recipe`.

    Raises:
        ConfigError: ``load_best_model_at_end`` is set; or see :func:`planned_runs`; or the output directory has a
            run in it that is not to be taken up.
    """
    from hf_reset.report.results import Results, environment_record

    if training.load_best_model_at_end:
        raise ConfigError(
            "`load_best_model_at_end` is True, and this recipe measures the last weights as well as the best. Leave "
            "it False; the best evaluated weights are kept in memory."
        )
    runs = planned_runs(options.seeds, compare=options.compare, resets=training.reset_config().can_reset)
    results = Results(
        training.output_dir,
        recipe=recipe,
        configuration=configuration,
        environment=environment_record(training.device, processes=training.world_size),
        resume=training.resume_from_checkpoint is not None,
        write=training.should_save,
    )
    return results, runs, print if training.should_save else lambda _: None


def fresh_engine() -> None:
    """Let the next Trainer of this process set its engine up anew: accelerate allows DeepSpeed one otherwise."""
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state.get("deepspeed_plugins") is not None:
        AcceleratorState._reset_state()


def save_whole_model(trainer: Any, path: str) -> None:
    """As `trainer.save_model`, to be called on every rank; FSDP's sharded checkpoints have no model of their own."""
    if not trainer.is_fsdp_enabled:
        trainer.save_model(path)
        return
    from hf_reset.anchor.shards import whole_state

    state = whole_state(trainer.accelerator, trainer.model_wrapped)
    if trainer.args.should_save:
        trainer._save(path, state_dict=state)


def run_arms(
    results: Results,
    runs: Sequence[tuple[str, int]],
    run_one: Callable[[str, int], Mapping[str, Any]],
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Run each (arm, seed) that has no record yet, and keep its record at once.

    Args:
        results: where records are kept.
        runs: see :func:`planned_runs`.
        run_one: trains and measures one arm from one seed; its record lacks only ``arm`` and ``seed``.
        say: how progress is told.
    """
    for number, (arm, seed) in enumerate(runs, start=1):
        where = f"[{number}/{len(runs)}] {arm}, seed {seed}"
        if results.has(arm, seed):
            say(f"{where}: recorded already, skipped")
            continue
        say(f"{where}: training")
        results.add({"arm": arm, "seed": seed, **run_one(arm, seed)})


def quiet_unless_terminal(training_arguments: TrainingArguments) -> list[TrainerCallback]:
    """Progress bars on a terminal; elsewhere (a log file, CI) one line an evaluation.

    Args:
        training_arguments: ``disable_tqdm`` is set where there is no terminal.

    Returns:
        Callbacks to hand to each Trainer.
    """
    if sys.stderr.isatty():
        return []
    from datasets import disable_progress_bars
    from transformers import TrainerCallback
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    training_arguments.disable_tqdm = True

    class EvaluationLines(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and state.max_steps:
                loss = kwargs.get("metrics", {}).get("eval_loss", float("nan"))
                print(f"  step {state.global_step}/{state.max_steps}: validation loss {loss:.4f}", flush=True)

    return [EvaluationLines()]


def load_file(path: str | Path, *, argument: str) -> Dataset:
    """A local csv, tsv, json, jsonl or parquet file, or one of these gzipped, as a data set.

    Args:
        path: the file.
        argument: name of the option it came by, for messages.

    Raises:
        DataError: the file is missing, has another suffix, or cannot be read.
    """
    from datasets import Dataset, load_dataset

    path = Path(path)
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in _FORMATS:
        raise DataError(f"`{argument}` {str(path)!r} has none of the suffixes {', '.join(_FORMATS)} (or with .gz).")
    if not path.is_file():
        raise DataError(f"`{argument}` {str(path)!r} is not a file. Check the path (seen from {Path.cwd().name!r}).")
    options: dict[str, Any] = {"delimiter": "\t"} if kind == "tsv" else {}
    try:
        loaded = load_dataset(_FORMATS[kind], data_files=str(path), **options)["train"]
    except Exception as error:  # whatever the reader of that format raises: the file is not what its suffix says
        reason = error.__cause__ or error
        raise DataError(
            f"`{argument}` {str(path)!r} cannot be read as {_FORMATS[kind]}, or is empty ({reason})."
        ) from error
    assert isinstance(loaded, Dataset)
    return loaded


def load_named(name: str, config: str | None = None) -> dict[str, Dataset]:
    """The splits of a data set on the hub, or of a local directory, by name.

    Raises:
        DataError: it cannot be loaded, or has no ``train`` split.
    """
    from datasets import DatasetDict, load_dataset

    try:
        loaded = load_dataset(name, config)
    except Exception as error:  # offline, no such name, a script refused: the remedy is the same
        raise DataError(
            f"`dataset_name` {name!r} cannot be loaded ({error}). Check the name and the network, or give "
            "local files with --train_file."
        ) from error
    assert isinstance(loaded, DatasetDict)
    if "train" not in loaded:
        raise DataError(f"`dataset_name` {name!r} has no split 'train', only {', '.join(map(str, loaded))}.")
    return {str(split): rows for split, rows in loaded.items()}


def load_splits(options: RecipeArguments, embedded: Callable[[], Mapping[Any, Dataset]]) -> dict[str, Dataset]:
    """The raw splits a recipe was asked for: local files, a named data set, or the embedded corpus.

    Args:
        options: the recipe's.
        embedded: makes the embedded corpus.

    Raises:
        ConfigError: files and a name were both given, or files without one for training.
        DataError: a file or data set cannot be read.
    """
    files = {split: getattr(options, f"{split}_file") for split in ("train", "validation", "test")}
    if any(files.values()) and files["train"] is None:
        raise ConfigError("`validation_file` or `test_file` was given without `train_file`. Give --train_file.")
    if files["train"] is not None and options.dataset_name is not None:
        raise ConfigError(f"`train_file` and `dataset_name` {options.dataset_name!r} were both given. Give one.")
    if files["train"] is not None:
        return {split: load_file(file, argument=f"{split}_file") for split, file in files.items() if file}
    if options.dataset_name is not None:
        return load_named(options.dataset_name, options.dataset_config_name)
    return {str(split): rows for split, rows in embedded().items()}


def carve(rows: Dataset, split: str, fraction: float, at_most: int | None, notes: list[str]) -> tuple[Dataset, Dataset]:
    """The first rows, for a split that was not given, and the rest; a note says so.

    Args:
        rows: those of training.
        split: ``"validation"`` or ``"test"``.
        fraction: share of the rows to take, in (0, 1).
        at_most: take exactly so many instead; None: the fraction.
        notes: receives the note.

    Raises:
        ConfigError: the fraction is not one.
        DataError: nothing would be left to train on.
    """
    argument = "max_predict_samples" if split == "test" else "max_eval_samples"
    if not 0 < fraction < 1:
        raise ConfigError(f"`{split}_fraction` must be in (0, 1), got {fraction}. 0.15 takes 15 % of the rows.")
    count = at_most if at_most is not None else math.ceil(fraction * len(rows))
    if count >= len(rows):
        raise DataError(
            f"`{argument}` {count} would leave no row to train on: there are {len(rows)}. Give less, or a "
            f"--{split}_file."
        )
    notes.append(f"No {split} split was given: {count} of {len(rows)} training rows were taken for it.")
    return rows.select(range(count)), rows.select(range(count, len(rows)))


def load_pretrained(
    load: Callable[..., Any], name: str, *, argument: str = "model_name_or_path", **options: Any
) -> Any:
    """``load(name, **options)`` of a ``from_pretrained``, with what can go wrong said in a line.

    Raises:
        ConfigError: there is no such model or tokenizer, or it cannot be loaded.
    """
    try:
        return load(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"`{argument}` {name!r} cannot be loaded ({str(error).splitlines()[0]}). Check the name and the "
            "network, or give a local directory; without it a small model is built from its config."
        ) from error


def arguments_of(training: Any, arm: str, seed: int) -> Any:
    """The arguments of one run: its own folder and seed, no resets in the plain arm.

    Training ends with the last step's weights in both arms, to measure them; what ``reset_finish`` asks for is
    what gets saved.

    Args:
        training: ``ResetTrainingArguments``, or others with ``ResetArguments`` in front.
        arm: ``"plain"`` or ``"reset"``.
        seed: of the run.
    """
    args = copy(training)
    args.output_dir = f"{training.output_dir}/{arm}-seed{seed}"
    args.seed = seed
    args.reset_finish = "last"
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # torch warns of it, each time, where there is no accelerator
    if arm == "plain":
        args.reset_probability = 0.0
    return args


def resume_point(training: Any, args: Any) -> str | None:
    """The newest whole checkpoint of one run, when the study is taken up again.

    Args:
        training: the study's arguments; resumed if its ``resume_from_checkpoint`` is set.
        args: the run's, from :func:`arguments_of`.
    """
    from hf_reset.training.resume import last_whole_checkpoint

    if training.resume_from_checkpoint is None:
        return None
    return last_whole_checkpoint(args.output_dir or "", world_size=args.world_size)


def best_weights(args: Any) -> BestWeightsCallback:
    """Keeps a run's best evaluated weights, which both arms are measured by; in a file too, where the run saves."""
    from hf_reset.training.best_weights import BestWeightsCallback

    path = None if args.save_strategy == "no" else f"{args.output_dir}/best_weights.safetensors"
    return BestWeightsCallback(args.reset_config(), path=path)


def train_run(trainer: Any, training: Any) -> dict[str, Any]:
    """Train one run, from where it was if the study is taken up again, and say what it cost.

    Args:
        trainer: of the run.
        training: the study's arguments.

    Returns:
        ``train_seconds``, and ``peak_memory_bytes``.
    """
    from transformers import PrinterCallback

    from hf_reset.report.results import peak_memory_bytes, reset_peak_memory

    trainer.remove_callback(PrinterCallback)  # where there is no terminal: raw dicts, beside our own lines
    reset_peak_memory(trainer.args.device)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume_point(training, trainer.args))
    seconds = time.perf_counter() - start
    return {"train_seconds": seconds, "peak_memory_bytes": peak_memory_bytes(trainer.args.device)}


def outcome(trainer: Any, best: BestWeightsCallback, curves: Mapping[str, str]) -> dict[str, Any]:
    """What happened on the way, for a run's record.

    Args:
        trainer: a `ResetTrainer`, after training.
        best: see :func:`best_weights`.
        curves: name of a curve in the record to its key in the log history; those without a point are left out.
    """
    from hf_reset.report.results import series

    callback, log = trainer.reset_callback, trainer.state.log_history
    return {
        "resets": callback.reset_state.resets,
        "reset_steps": [event["step"] for event in callback.events if event["kind"] == "reset"],
        "steps": trainer.state.global_step,
        "best_step": best.step,
        "best_metric": best.best,
        "history": {name: curve for name, key in curves.items() if (curve := series(log, key))},
    }


def save_final_model(trainer: Any, finish: str, best: BestWeightsCallback, path: str) -> None:
    """Save the last weights, or the anchor's (in the plain arm: the best evaluated), as ``reset_finish`` says.

    Args:
        trainer: a `ResetTrainer`, after training.
        finish: the study's ``reset_finish``.
        best: see :func:`best_weights`.
        path: directory to save to.
    """
    store = trainer.reset_callback.store
    anchor = store.swapped() if store is not None and store.is_set else best.swapped()
    with anchor if finish == "anchor" else nullcontext():
        save_whole_model(trainer, path)


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_config_option(parser)
    return parser


def _add_config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="options as YAML; the command line overrides them")


def _as_options(config: Mapping[str, Any]) -> list[str]:
    """The configuration as command-line words, so that both go through the same types and choices."""
    words: list[str] = []
    for key, value in config.items():
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, (bool, dict)) else value}")
    return words


def _option_names(words: Sequence[str]) -> set[str]:
    names = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def _configuration(instances: Sequence[Any], given: set[str]) -> dict[str, Any]:
    first = instances[0]
    return {
        one.name: plain(getattr(instance, one.name))
        for instance in instances
        for one in fields(instance)
        if (instance is first or one.name in given or one.name.startswith("reset_")) and not one.name.endswith("_token")
    }


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name.split("=")[0].replace("-", "_"), sorted(known), n=1)
    return f" (the nearest known is {close[0]!r})" if close else ""
