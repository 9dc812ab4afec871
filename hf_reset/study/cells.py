"""A study in one file: cells that are runs of seconds or minutes, each recorded as it ends, what is there skipped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from hf_reset.files import write_atomic

Cell: TypeAlias = dict[str, Any]
"""What is asked of a run, and once it has run also what it gave: names to JSON-plain values."""


def complete(
    path: Path,
    asked: Iterable[Cell],
    carry_out: Callable[[Cell], Mapping[str, object]],
    **content: object,
) -> list[Cell]:
    """Carry out the cells that a results file lacks; it is written after each.

    Args:
        path: the file.
        asked: the cells; a record that has all of a cell's items is its record.
        carry_out: the run of a cell; what it gives is added to the cell's items.
        content: what else the file is to hold, beside "environment" and "records".

    Returns:
        All records of the file.
    """
    import torch
    from rich.progress import track

    from hf_reset.report.environment import environment_record

    known = json.loads(path.read_text(encoding="utf-8"))["records"] if path.is_file() else []
    todo = [cell for cell in asked if not any(cell.items() <= record.items() for record in known)]
    path.parent.mkdir(parents=True, exist_ok=True)
    for cell in track(todo, description=path.stem, console=None, disable=not sys.stderr.isatty()):
        known.append({**cell, **carry_out(cell)})
        head = json.dumps({"environment": environment_record(torch.device("cpu")), **content})
        lines = ",\n".join(json.dumps(record) for record in known)
        write_atomic(path, f'{head[:-1]},\n"records": [\n{lines}\n]}}\n')
    return known
