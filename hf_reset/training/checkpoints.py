"""Where an anchor lies inside a checkpoint directory, and which checkpoints are whole. Needs no torch.

Trainer writes `trainer_state.json` last and not atomically, and other ranks may still be writing then. A run
killed at any moment therefore leaves, at worst, one directory that is not whole; the one before it is.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from hf_reset.errors import AnchorFileError
from hf_reset.planner.excursions import recorded_events

if TYPE_CHECKING:
    from hf_reset.anchor.shards import Layout

_DIRECTORY = re.compile(r"checkpoint-(\d+)")
ANCHOR, AVERAGE = "reset_anchor", "reset_average"  # directories under FSDP2, else the stems of files
_SHARD = re.compile(rf"(?:{ANCHOR}|{AVERAGE})-rank\d+-of-(\d+)\.safetensors")


def anchor_file(
    directory: str | Path, layout: Layout = "whole", *, rank: int = 0, world_size: int = 1, stem: str = ANCHOR
) -> Path:
    """The place of the anchor, or of the average: a file for all ranks, or one a rank for pieces of flat tensors.

    Where they are rows of DTensors, which know where they belong, one directory for all ranks.
    """
    if layout == "rows":
        return Path(directory) / stem
    name = f"{stem}-rank{rank}-of-{world_size}" if layout == "flat" else stem
    return Path(directory) / f"{name}.safetensors"


def refuse_other_world_size(directory: str | Path, world_size: int) -> None:
    """Flat shares of the ranks of one world size (DeepSpeed, FSDP1) cannot be dealt out to another.

    Raises:
        AnchorFileError: the checkpoint has anchors of another number of processes, and none of this.
    """
    found = {int(match.group(1)): file for file in Path(directory).glob("*") if (match := _SHARD.fullmatch(file.name))}
    if found and world_size not in found:
        size, file = next(iter(found.items()))
        raise AnchorFileError(
            f"The anchor {str(file)!r} is one of {size} shares, written by {size} processes, and this run has "
            f"{world_size}. Shares of DeepSpeed and FSDP1 cannot be dealt out anew: resume with {size} processes, or "
            "start a new run from the checkpoint's weights."
        )


def last_whole_checkpoint(output_dir: str | Path, *, world_size: int = 1) -> str | None:
    """The newest checkpoint in `output_dir` from which a run can go on exactly, or None.

    Use it instead of `resume_from_checkpoint=True` with the plain callback; `ResetTrainer` does by itself.

    Args:
        output_dir: the directory that holds `checkpoint-N` directories.
        world_size: number of processes; each has a random state of its own in the checkpoint.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _DIRECTORY.fullmatch(path.name)]
    newest_first = sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)
    return next((str(path) for path in newest_first if is_whole(path, world_size=world_size)), None)


def is_whole(directory: str | Path, *, world_size: int = 1) -> bool:
    """Whether every file that an exact resume reads was written to its end."""
    directory = Path(directory)
    try:
        state = json.loads((directory / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    anchor_expected = bool(recorded_events(state.get("stateful_callbacks")))
    if not (_kept_whole(directory, ANCHOR, anchor_expected) and _kept_whole(directory, AVERAGE, False)):
        return False
    if world_size == 1 or not any(directory.glob("rng_state_*.pth")):
        return True
    # More processes than wrote it find no random state for some of them, and start those from the seed.
    states = [directory / f"rng_state_{rank}.pth" for rank in range(min(world_size, _writers(directory) or world_size))]
    return all(path.is_file() and zipfile.is_zipfile(path) for path in states)


def _writers(directory: Path) -> int | None:
    """How many processes wrote a checkpoint, as its anchor or average says, which are whole; None: it has neither."""
    shared = next((directory / stem for stem in (ANCHOR, AVERAGE) if (directory / stem).is_dir()), None)
    if shared is not None:
        from hf_reset.anchor.dtensor_file import read_shared_header

        header = read_shared_header(shared)[0]
    else:
        file = next((file for stem in (ANCHOR, AVERAGE) for file in directory.glob(f"{stem}*.safetensors")), None)
        if file is None:
            return None
        with safe_open(file, framework="numpy") as anchor:  # pyright: ignore[reportPrivateImportUsage]
            header = anchor.metadata() or {}
    return json.loads(header.get("metadata", "{}")).get("world_size")


def _kept_whole(directory: Path, stem: str, expected: bool) -> bool:
    """Whether an anchor or an average lies in a checkpoint to its end, or is not expected and not there."""
    if (directory / stem).is_dir():
        return _is_whole_distributed(directory / stem)
    files = list(directory.glob(f"{stem}*.safetensors"))
    if not files:
        # A model-only checkpoint has no anchor by intent, and no optimizer either: it is no resume point.
        return not expected
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if shards and len(shards) != int(shards[0].group(1)):
        return False
    return all(_opens(file) for file in files)


def _is_whole_distributed(directory: Path) -> bool:
    from hf_reset.anchor.dtensor_file import missing_share  # torch, which a look at other checkpoints does without

    try:
        return missing_share(directory) is None
    except AnchorFileError:
        return False


def _opens(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(file, framework="numpy"):  # pyright: ignore[reportPrivateImportUsage]
            return True
    except (SafetensorError, OSError):
        return False
