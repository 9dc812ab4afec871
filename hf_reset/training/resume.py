"""The anchor and the audit trail in a checkpoint: saved, found, and taken up again."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reset.anchor.file import read_metadata, write_copy
from hf_reset.anchor.ranks import gathered, together
from hf_reset.anchor.store import AnchorStore
from hf_reset.errors import AnchorFileError
from hf_reset.planner.excursions import EVENTS, Event, recorded_events
from hf_reset.policy import ResetConfig, ResetState
from hf_reset.training.checkpoints import ANCHOR, AVERAGE, anchor_file, refuse_other_world_size
from hf_reset.training.ema import Average
from hf_reset.training.evidence import RowEvidence

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from hf_reset.training.metric import MetricWatch

logger = logging.getLogger(__name__)


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
    events: list[Event]
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


def record_event(state: TrainerState, event: Event) -> None:
    """Put an event where Trainer saves it: in `trainer_state.json`, and not among its own logs.

    Other code takes records of `log_history` by their position. An `ExportableState` would do, but for a callback's
    name Trainer then makes a new instance at a resume, and the user's would know nothing of the run.
    """
    saved: Any = state.stateful_callbacks
    saved.setdefault(EVENTS, []).append(dict(event))


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
    events = [event for event in recorded_events(state.stateful_callbacks) if event["kind"] != "advice"]
    if not events:  # no anchor yet, or a run that began without resets
        if store is not None:
            with together():
                store.refuse_unknown_fresh()
        return now
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


def save_average(directory: str | Path, average: Average, args: TrainingArguments) -> None:
    """Write the live weights beside a checkpoint whose model is the average. All ranks call it, inside a swap."""
    file, metadata = _file_in(directory, average, args, AVERAGE), {"world_size": args.world_size}
    if average.layout == "rows":  # a collective, whose errors are common already
        average.save(file, metadata)
        return
    with together():
        if _writes(args, average):
            average.save(file, metadata)


def take_up_average(
    directory: str | Path | None, average: Average | None, args: TrainingArguments, state: TrainerState
) -> None:
    """After Trainer has loaded a checkpoint: its model becomes the average, and the live weights are put in.

    Args:
        directory: where it lies; None: under its number in `output_dir`.
        average: the average; None where none is taken, which is said if the checkpoint was written with one.
        args: the Trainer's arguments.
        state: the Trainer's state, as it was saved.

    Raises:
        AnchorFileError: the file belongs to another model, scope or number of processes.
    """
    directory = Path(directory or Path(args.output_dir or "") / f"checkpoint-{state.global_step}")
    found = any(gathered(any(directory.glob(f"{AVERAGE}*"))))
    if average is None and found:
        logger.warning(
            "The weights of %s are a moving average, and the run goes on from them: set `ema_decay` as it was to go on "
            "from the weights that `%s` beside them keeps.",
            directory,
            AVERAGE,
        )
    elif average is not None and not found:
        logger.warning("%s has no average; one begins from its weights.", directory)
        average.follow()
    elif average is not None:
        with together():
            refuse_other_world_size(directory, args.world_size)
        file = _file_in(directory, average, args, AVERAGE)
        with nullcontext() if average.layout == "rows" else together():
            average.load(file)


def _load(file: Path, store: AnchorStore | None) -> dict[str, Any]:
    if store is not None and store.layout == "rows":  # a collective, whose errors are common already
        return store.load(file)
    metadata: dict[str, Any] = {}
    with together():
        metadata.update(read_metadata(file) if store is None else store.load(file))
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


def _trail_digest(events: list[Event]) -> str:
    """A fingerprint of a run's audit trail, equal on all ranks (distances of shards are not)."""
    trail = json.dumps([[event["kind"], event["step"], event["metric"]] for event in events])
    return hashlib.blake2b(trail.encode(), digest_size=16).hexdigest()


def _writes(args: TrainingArguments, store: AnchorStore | Average | None) -> bool:
    """Whether this rank writes a file, or its part of one."""
    return args.should_save or (store is not None and store.layout != "whole")


def _file_in(
    directory: str | Path, store: AnchorStore | Average | None, args: TrainingArguments, stem: str = ANCHOR
) -> Path:
    return anchor_file(
        directory,
        "whole" if store is None else store.layout,
        rank=args.process_index,
        world_size=args.world_size,
        stem=stem,
    )
