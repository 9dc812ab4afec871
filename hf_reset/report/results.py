"""The results file of a recipe: configuration, environment, and one record an arm and seed.

`results.json` is the one source that reports, figures and README tables are rendered from. It is written
after every finished run, whole or not at all, so that a study which is cut off keeps what it has.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_reset.errors import ConfigError, DataError
from hf_reset.files import write_atomic
from hf_reset.report.tables import Record

RESULTS_NAME = "results.json"
_RENAMED = {"label_memory": "label_memory_last"}
_RESETS_IN_0_1 = {"plain": False, "reset": True}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy as numbers, paths and enums as text, NaN and ±inf as None."""
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return str(getattr(value, "value", value))  # a str enum, such as transformers' strategies
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return plain(value.tolist())
    if isinstance(value, (Sequence, set, frozenset)):
        return [plain(entry) for entry in value]
    return str(getattr(value, "value", value))


class Results:
    """The records of one study, kept in `OUTPUT_DIR/results.json`.

    Args:
        output_dir: folder of the study.
        recipe: the recipe's name, e.g. `"text_classification"`.
        configuration: everything that was asked for, JSON-plain.
        environment: see `environment_record`.
        resume: take over the records that lie there already, when their configuration is this one. False: a
            folder with a run in it is refused.
        free: configuration keys that may differ from those of the records taken over, such as `seeds`.
        write: False on the processes that are not the main one; they keep records but touch no file.

    Raises:
        ConfigError: `output_dir` has a run in it and `resume` is False, or its configuration differs.
        DataError: the file there cannot be read.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        recipe: str,
        configuration: Record,
        environment: Record,
        resume: bool = False,
        free: Sequence[str] = ("seeds", "compare", "output_dir", "resume_from_checkpoint"),
        write: bool = True,
    ) -> None:
        self.path = Path(output_dir) / RESULTS_NAME
        self.recipe = recipe
        self.configuration = plain(configuration)
        self.environment = plain(environment)
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []
        self._write = write
        check_output_dir(output_dir, resume=resume)
        if resume and self.path.exists():
            earlier = read_results(self.path)
            _refuse_other_configuration(self.path, earlier["configuration"], self.configuration, free)
            self.records = list(earlier["records"])
            self.note(*earlier.get("notes", ()))  # of seeds whose data nobody prepares again

    def has(self, arm: str, seed: int) -> bool:
        """Whether the record of this arm and seed is there."""
        return any(record["arm"] == arm and record["seed"] == seed for record in self.records)

    def add(self, record: Record) -> None:
        """Put in the record of one arm and seed, replacing an earlier one of the same, and write the file."""
        new = plain(record)
        key = (new["arm"], new["seed"])
        self.records = [old for old in self.records if (old["arm"], old["seed"]) != key] + [new]
        self.save()

    def note(self, *texts: str) -> None:
        """Remember sentences for the report (what was dropped, what chose the anchors), each once."""
        self.notes += [text for text in dict.fromkeys(texts) if text not in self.notes]

    def save(self) -> None:
        """Write the file, atomically; on a process that does not write, nothing."""
        if self._write:
            write_atomic(self.path, _readable(self.as_dict()) + "\n")

    def as_dict(self) -> dict[str, object]:
        """What the file holds."""
        return {
            "recipe": self.recipe,
            "configuration": self.configuration,
            "environment": self.environment,
            "notes": list(self.notes),
            "records": self.records,
        }


def read_results(path: str | Path) -> dict[str, Any]:
    """The content of a results file (or of the one in a folder); records of 0.1 come in today's form.

    Raises:
        DataError: the file is missing, is not JSON, or has no `configuration` or `records`.
    """
    path = Path(path)
    path = path / RESULTS_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"results file {str(path)!r} cannot be read ({error}). Give a results.json.") from error
    if not isinstance(content, dict) or not {"configuration", "records"} <= content.keys():
        raise DataError(f"{str(path)!r} is not a results file: it has no `configuration` and `records`.")
    content["records"] = [_of_today(record) for record in content["records"]]
    return content


def _of_today(record: Record) -> dict[str, object]:
    """A record of 0.1 did not say whether it could reset (two arms said so by name), and had another memory key."""
    renamed = {_RENAMED.get(key, key): value for key, value in record.items()}
    if "can_reset" not in renamed:
        renamed["can_reset"] = _RESETS_IN_0_1.get(record["arm"], bool(record.get("resets")))
    return renamed


def check_output_dir(output_dir: str | Path, *, resume: bool) -> None:
    """Refuse a folder that has a run in it, unless the run is to be taken up again.

    A run shows by a results file, a Trainer checkpoint, or a run's folder with one (`ARM-seed0`).

    Raises:
        ConfigError: `output_dir` is not a folder, or has a run in it and `resume` is False.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`output_dir` is {str(output_dir)!r}, which is a file. Name a folder.")
    if resume or not folder.is_dir():
        return
    patterns = (RESULTS_NAME, "checkpoint-*", "*-seed*/checkpoint-*")
    entries = (entry for pattern in patterns for entry in sorted(folder.glob(pattern)))
    found = next((entry.relative_to(folder) for entry in entries if not _holds_no_run(entry)), None)
    if found is not None:
        raise ConfigError(
            f"`output_dir` is {str(output_dir)!r}, which has a run in it ({found}). Name another folder with "
            "--output_dir, take the run up again with --resume_from_checkpoint last, or remove the folder."
        )


def _holds_no_run(path: Path) -> bool:
    """Whether it is the results file of a study that was cut off in its first run: there is nothing to lose."""
    try:
        return path.name == RESULTS_NAME and read_results(path)["records"] == []
    except DataError:
        return False


def series(log_history: Sequence[Record], key: str) -> list[list[float]]:
    """One curve of a run: `[[step, value], …]` for every entry of the log history that has `key`."""
    return [[entry["step"], plain(entry[key])] for entry in log_history if entry.get(key) is not None]


def value_at(curve: Sequence[Sequence[float]], step: int | None) -> float | None:
    """The value that a curve of `series` has at a step; None where it has none there."""
    return next((value for at, value in curve if at == step), None)


def _readable(content: object) -> str:
    """Indented JSON in which a list of numbers, or of pairs of them, takes one line."""
    text = json.dumps(content, indent=1, allow_nan=False)
    for inner in (r"[^\[\]{}\n]+", r"\[[^\[\]{}\n]*\]"):  # JSON strings hold no raw line breaks
        pattern = rf"\[\n\s*({inner}(?:,\n\s*{inner})*)\n\s*\]"
        text = re.sub(pattern, lambda found: "[" + re.sub(r",\n\s*", ", ", found[1]) + "]", text)
    return text


def _refuse_other_configuration(path: Path, earlier: Record, now: Record, free: Sequence[str]) -> None:
    differing = sorted(
        key for key in earlier.keys() | now.keys() if key not in free and earlier.get(key) != now.get(key)
    )
    if differing:
        said = "; ".join(f"{key}: {earlier.get(key)!r} there, {now.get(key)!r} now" for key in differing[:5])
        raise ConfigError(
            f"the run in `output_dir` ({path}) has another configuration ({said}). Give the same options to "
            "take it up again, or name another folder with --output_dir."
        )


def run_folder(arm: str, seed: int) -> str:
    """What the folder of a run is called, such as "reset+refine-seed0"."""
    return f"{arm.replace(' ', '')}-seed{seed}"
