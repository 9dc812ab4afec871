"""The options of a recipe: from YAML and the command line, checked by name, and what a recipe is as a command.

Kept free of torch, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from hf_reset.errors import ConfigError, ResetError
from hf_reset.report.results import plain

_INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG}


def option(default: Any, text: str, *, at_least: float | None = None) -> Any:
    """A field of a recipe's dataclass, with its help, and the smallest value that it may have."""
    return field(default=default, metadata={"help": text, "at_least": at_least})


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
    max_train_samples: int | None = option(None, "At most so many training rows.", at_least=1)
    max_eval_samples: int | None = option(
        None, "At most (where taken from training, exactly) so many validation rows.", at_least=1
    )
    max_predict_samples: int | None = option(None, "Likewise for the test.", at_least=1)

    def sources(self) -> dict[str, Any]:
        """Where rows come from, as `splits.load_splits` takes it."""
        files = {split: getattr(self, f"{split}_file") for split in ("train", "validation", "test")}
        names = {"dataset_name": self.dataset_name, "dataset_config_name": self.dataset_config_name}
        return {"files": files, **names}

    def sizes(self) -> dict[str, Any]:
        """How many rows each split shall have, as the preparation of data takes it."""
        names = ("validation_fraction", "test_fraction", "max_train_samples", "max_eval_samples", "max_predict_samples")
        return {name: getattr(self, name) for name in names}


def run_command(
    run: Callable[[Sequence[str]], object],
    recipe_arguments: Any,
    *,
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Be the command of a recipe: its help, an error in one line with exit status 1, a clean end of all processes.

    Ctrl-C and a disk that takes no files end in a line too.

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
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume_from_checkpoint last goes on from there.", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        reason = _disk_refusal(error)
        if reason is None:
            raise
        sys.exit(f"error: {reason}. Make room or name another folder with --output_dir; finished runs are kept.")
    from hf_reset.anchor.ranks import end_process_group

    end_process_group()


class _Parser(HfArgumentParser):
    """HfArgumentParser which raises what argparse would print and exit with, without the page of usage."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's; a field's smallest value is no setting of it."""
        settings.pop("at_least", None)
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See --help.")


def show_help(argv: Sequence[str], recipe_arguments: Any, *, description: str) -> bool:
    """Answer `-h` or `--help` from the recipe's own options alone, before torch is imported.

    Args:
        argv: the command line without the script's name.
        recipe_arguments: the recipe's dataclass.
        description: the recipe's docstring.

    Returns:
        Whether help was asked for (and printed).
    """
    if not {"-h", "--help"} & set(argv):
        return False
    parser = _Parser(
        recipe_arguments,
        description=description,
        epilog="Every field of transformers.TrainingArguments and every reset_* field of "
        "hf_reset.ResetTrainingArguments is an option too; --help_all lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config_option(parser)
    parser.print_help()
    return True


def parse_recipe(argument_classes: Sequence[Any], argv: Sequence[str]) -> tuple[Any, ...]:
    """Options of a recipe: from `--config FILE.yaml`, overridden by those on the command line.

    Args:
        argument_classes: dataclasses whose fields are the options.
        argv: the command line without the script's name.

    Returns:
        One instance of each class, in order; then the configuration, JSON-plain, for `results.json`: all that
        was given, all fields of the first class, and all `reset_*` fields.

    Raises:
        ConfigError: an option is unknown (the nearest known one is named), or has a value it cannot have; the
            configuration file is missing or is not a mapping.
    """
    parser = _Parser(argument_classes, allow_abbrev=False)
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
    given = _option_names([*from_file, *argv]) & known
    refuse_ignored({one.name: getattr(instance, one.name) for instance in instances for one in fields(instance)}, given)
    for instance in instances:
        refuse_too_small(instance)
    return (*instances, _configuration(instances, given=given))


def refuse_ignored(values: Mapping[str, object], given: set[str]) -> None:
    """Refuse options that a recipe would not obey.

    Args:
        values: all options.
        given: names of those that were given.

    Raises:
        ConfigError: an option has no effect beside the others, or where it was given.
    """
    kind, rate = values.get("noise_kind"), values.get("noise_rate", 0.0)
    resumes = values.get("resume_from_checkpoint")
    if "seed" in given and "seeds" in values:
        raise ConfigError(f"`seed` {values['seed']} would be ignored: each run has its own. Give --seeds.")
    if "noise_kind" in given and "noise_rate" not in given and kind != "matrix":
        raise ConfigError(f"`noise_kind` {kind!r} without `noise_rate` adds no noise. Give --noise_rate, or neither.")
    if values.get("noise_matrix") is not None and kind != "matrix":
        raise ConfigError(f"`noise_matrix` would be ignored with `noise_kind` {kind!r}. Give --noise_kind matrix.")
    if kind == "matrix" and "noise_rate" in given and rate != 0:
        raise ConfigError(f"`noise_rate` {rate} would be ignored: with `noise_kind` matrix the matrix sets it.")
    if values.get("loss") is not None and values.get("reset_loss") is not None:
        raise ConfigError(
            f"`loss` {values['loss']!r} and `reset_loss` {values['reset_loss']!r} are the same. Give one."
        )
    if values.get("loss_options") is not None and values.get("loss") is None:
        raise ConfigError("`loss_options` needs a `loss` to apply to; for `reset_loss` give --reset_loss_options.")
    if resumes is not None and str(resumes).lower() not in ("last", "true"):
        raise ConfigError(
            f"`resume_from_checkpoint` is {resumes!r}. A study is taken up as a whole, each run at its newest whole "
            "checkpoint under `output_dir`: give --resume_from_checkpoint last and the study's --output_dir."
        )


def refuse_too_small(options: Any) -> None:
    """Refuse an option below the smallest value that its field allows, and not-a-number.

    Raises:
        ConfigError: naming the first.
    """
    for one in fields(options):
        least, value = one.metadata.get("at_least"), getattr(options, one.name)
        if least is not None and value is not None and not value >= least:
            raise ConfigError(f"`{one.name}` must be at least {least}, got {value}.")


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


def _disk_refusal(error: BaseException | None) -> str | None:
    """Why the disk did not take a file, whichever library met it; None where that is not what happened."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
        if any(text in str(error) for text in ("No space left on device", "file write failed")):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_config_option(parser)
    return parser


def _add_config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="options as YAML; the command line overrides them")


def _as_options(config: Mapping[str, object]) -> list[str]:
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
