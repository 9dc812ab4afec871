"""The anchor in a checkpoint: saved, found, and taken up again; and which checkpoints are whole.

Trainer writes `trainer_state.json` last and not atomically, and other ranks may still be writing then. A run
killed at any moment therefore leaves, at worst, one directory that is not whole; the one before it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from hf_reset.anchor.ranks import gathered, together
from hf_reset.errors import AnchorFileError
from hf_reset.policy import ResetConfig, ResetState
from hf_reset.training.evidence import RowEvidence

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from hf_reset.anchor.shards import Layout
    from hf_reset.anchor.store import AnchorStore
    from hf_reset.training.metric import MetricWatch

logger = logging.getLogger(__name__)

_DIRECTORY = re.compile(r"checkpoint-(\d+)")
_DISTRIBUTED = "reset_anchor"
_SHARD = re.compile(r"reset_anchor-rank\d+-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Progress:
    """A run as a checkpoint keeps it: what has happened, and what it was configured to do.

    Attributes:
        state: what has happened so far.
        events: the audit trail, one record a reset or an anchor move.
        config: the configuration.
        watch: the metric that chooses anchors.
        seed: of the draws.
        world_size: number of processes.
        evidence: validation rows at the anchor and since.
    """

    state: ResetState
    events: list[dict[str, Any]]
    config: ResetConfig
    watch: MetricWatch
    seed: int
    world_size: int
    evidence: RowEvidence = field(default_factory=RowEvidence)

    def metadata(self) -> dict[str, Any]:
        """What is written beside the anchor."""
        return {
            "state": asdict(self.state),
            "trail": _trail_digest(self.events),
            "seed": self.seed,
            "world_size": self.world_size,
            "config": asdict(self.config),
            "evidence": self.evidence.as_json(),
        }


def saved_into(args: TrainingArguments, state: TrainerState, store: AnchorStore | None) -> Path | None:
    """The checkpoint that Trainer has just written, as far as a callback can tell; None, and said, where it cannot."""
    directory = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
    if all(gathered(directory.is_dir() or not _writes(args, store))):
        return directory
    logger.warning(
        "The anchor was not saved: there is no %s. A hyperparameter search writes elsewhere; use ResetTrainer "
        "there to be able to resume.",
        directory,
    )
    return None


def save_progress(
    directory: str | Path, store: AnchorStore | None, progress: Progress, args: TrainingArguments
) -> None:
    """Write the anchor and the progress into a checkpoint directory, whole or not at all. All ranks call it."""
    file = _file_in(directory, store, args)
    if store is not None and store.layout == "rows":  # a collective, whose errors are common already
        store.save(file, progress.metadata())
        return
    with together():
        if not _writes(args, store):
            return
        if store is not None:
            store.save(file, progress.metadata())
        else:  # nothing is kept, but the audit trail goes on after a resume
            from hf_reset.anchor.file import write_copy  # torch, which a look at other checkpoints does without

            write_copy(file, {}, {"metadata": json.dumps(progress.metadata())})


def take_up(
    directory: str | Path | None,
    store: AnchorStore | None,
    now: Progress,
    args: TrainingArguments,
    state: TrainerState,
) -> Progress:
    """Load the anchor of the checkpoint that Trainer has just loaded. All ranks call it.

    Args:
        directory: where it lies; None: under its number in `output_dir`.
        store: takes the anchor; None where none is kept.
        now: the run as it is configured now.
        args: the Trainer's arguments.
        state: the Trainer's state, as it was saved.

    Returns:
        The run as it was then, where it had an anchor; else `now`.

    Raises:
        AnchorFileError: the anchor is missing, or belongs to another run, model or scope.
    """
    events = reset_records(state.log_history)
    if not events:
        return now  # no anchor yet, or a run that began without resets
    directory = directory or Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
    file = _file_in(directory, store, args)
    with together():
        refuse_other_world_size(directory, args.world_size)
        _refuse_no_file(file)
    metadata = _load(file, store)
    with together():
        if metadata.get("trail") != _trail_digest(events):
            raise AnchorFileError(
                f"The anchor file {str(file)!r} belongs to another run than the checkpoint being resumed: their "
                "records of resets differ. If the checkpoint lies elsewhere, name it: "
                "`StochasticResetCallback(..., resume_from_checkpoint=...)`, or use `ResetTrainer`, which knows."
            )
    _say_changes(metadata, now)
    evidence = RowEvidence.from_json(metadata["evidence"]) if "evidence" in metadata else now.evidence
    return replace(now, state=ResetState.from_plain(metadata["state"]), events=events, evidence=evidence)


def _load(file: Path, store: AnchorStore | None) -> dict[str, Any]:
    if store is not None and store.layout == "rows":  # a collective, whose errors are common already
        return store.load(file)
    metadata: dict[str, Any] = {}
    with together():
        if store is not None:
            metadata = store.load(file)
        else:
            from hf_reset.anchor.file import read_metadata

            metadata = read_metadata(file)
    return metadata


def _say_changes(before: dict[str, Any], now: Progress) -> None:
    if before["seed"] != now.seed:
        logger.warning(
            "Resuming with reset seed %s; the checkpoint was written with %s. Set `seed` to that to repeat it.",
            now.seed,
            before["seed"],
        )
    if before["world_size"] != now.world_size and now.watch.key.endswith("loss"):
        logger.warning(
            "Resuming with %s processes a run of %s. Where a model's loss ignores `num_items_in_batch`, Trainer "
            "scales it by their number, so that %r and its best value may not be comparable. Choose another "
            "`metric`, such as an accuracy, or start from the weights alone.",
            now.world_size,
            before["world_size"],
            now.watch.key,
        )


def _refuse_no_file(file: Path) -> None:
    if not file.exists():
        raise AnchorFileError(
            f"The run being resumed had an anchor, and there is no {str(file)!r}. If the checkpoint lies "
            "elsewhere, name it: `StochasticResetCallback(..., resume_from_checkpoint=...)`, or use "
            "`ResetTrainer`, which knows. If the run was killed between the checkpoint and its anchor, resume "
            "from the one before: `hf_reset.last_whole_checkpoint(output_dir)`."
        )


def _trail_digest(events: list[dict[str, Any]]) -> str:
    """A fingerprint of a run's audit trail, equal on all ranks (distances of shards are not)."""
    trail = json.dumps([[event["kind"], event["step"], event["metric"]] for event in events])
    return hashlib.blake2b(trail.encode(), digest_size=16).hexdigest()


def _writes(args: TrainingArguments, store: AnchorStore | None) -> bool:
    """Whether this rank writes an anchor file, or its part of one."""
    return args.should_save or (store is not None and store.layout != "whole")


def _file_in(directory: str | Path, store: AnchorStore | None, args: TrainingArguments) -> Path:
    return anchor_file(
        directory,
        "whole" if store is None else store.layout,
        rank=args.process_index,
        world_size=args.world_size,
    )


def anchor_file(directory: str | Path, layout: Layout = "whole", *, rank: int = 0, world_size: int = 1) -> Path:
    """The anchor's place in a checkpoint: a file for all ranks, or one a rank where shares are pieces of flat tensors.

    Where they are rows of DTensors, which know where they belong, one directory for all ranks.
    """
    if layout == "rows":
        return Path(directory) / _DISTRIBUTED
    name = f"reset_anchor-rank{rank}-of-{world_size}" if layout == "flat" else "reset_anchor"
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


def reset_records(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The audit trail inside a Trainer's log history: one record a reset, an anchor move, or a choice of "auto"."""
    return [record for record in log_history if record.get("kind") in ("reset", "anchor", "plan")]


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
    if not _anchors_are_whole(directory, expected=bool(reset_records(state.get("log_history", [])))):
        return False
    if world_size == 1 or not any(directory.glob("rng_state_*.pth")):
        return True
    # More processes than wrote it find no random state for some of them, and start those from the seed.
    states = [directory / f"rng_state_{rank}.pth" for rank in range(min(world_size, _writers(directory) or world_size))]
    return all(path.is_file() and zipfile.is_zipfile(path) for path in states)


def _writers(directory: Path) -> int | None:
    """How many processes wrote a checkpoint, as its anchor says; None where it has none. The anchor is whole."""
    if (directory / _DISTRIBUTED).is_dir():
        from hf_reset.anchor.dtensor_file import read_shared_header

        header = read_shared_header(directory / _DISTRIBUTED)[0]
    else:
        file = next(directory.glob("reset_anchor*.safetensors"), None)
        if file is None:
            return None
        with safe_open(file, framework="numpy") as anchor:  # pyright: ignore[reportPrivateImportUsage]
            header = anchor.metadata() or {}
    return json.loads(header.get("metadata", "{}")).get("world_size")


def _anchors_are_whole(directory: Path, *, expected: bool) -> bool:
    if (directory / _DISTRIBUTED).is_dir():
        return _is_whole_distributed(directory / _DISTRIBUTED)
    files = list(directory.glob("reset_anchor*.safetensors"))
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
