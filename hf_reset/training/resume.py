"""The anchor and the audit trail in a checkpoint: saved, found, and taken up again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
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
from hf_reset.training.metric import MetricWatch

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments


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

    def metadata(self) -> dict[str, object]:
        """What is written beside the anchor."""
        return {
            "state": asdict(self.state),
            "trail": _trail_digest(self.events),
            "seed": self.seed,
            "world_size": self.world_size,
            "config": asdict(self.config),
            "metric": asdict(self.watch),
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
    found: list[Progress] = []
    with together():
        found.append(_read_progress(file, metadata, events))
    before = found[0]
    _say_changes(before, now)
    if (before.watch.key, before.watch.greater_is_better) == (now.watch.key, now.watch.greater_is_better):
        return replace(now, state=before.state, events=events, evidence=before.evidence)
    # The best of another metric says nothing: the weights stay the anchor until this one has chosen.
    was = before.state
    kept = ResetState(anchor_step=was.anchor_step, resets=was.resets, last_reset_step=was.last_reset_step)
    return replace(now, state=kept, events=events)


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


def _read_progress(file: Path, metadata: dict[str, Any], events: list[Event]) -> Progress:
    """The run that wrote a checkpoint.

    Raises:
        AnchorFileError: the file's header is not as `Progress.metadata` makes it, or that of another run.
    """
    try:
        if metadata["trail"] != _trail_digest(events):
            raise AnchorFileError(
                f"The anchor file {str(file)!r} belongs to another run than the checkpoint being resumed: their "
                "records of resets differ. If the checkpoint lies elsewhere, name it: "
                "`StochasticResetCallback(..., resume_from_checkpoint=...)`, or use `ResetTrainer`, which knows."
            )
        _check_numbers({name: value for name, value in metadata["state"].items() if name not in ("plan", "values")})
        _check_numbers({name: metadata[name] for name in ("seed", "world_size")})
        return Progress(
            state=ResetState.from_plain(metadata["state"]),
            events=events,
            config=ResetConfig(**metadata["config"]),
            # Older ones have `min_delta` there too, which the configuration has.
            watch=MetricWatch(**{name: value for name, value in metadata["metric"].items() if name != "min_delta"}),
            seed=metadata["seed"],
            world_size=metadata["world_size"],
            evidence=RowEvidence.from_json(metadata["evidence"]),
        )
    except AnchorFileError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AnchorFileError(
            f"The header of the anchor file {str(file)!r} is not as this version writes it ({type(error).__name__}: "
            f"{error}). Another version wrote it, or it was changed: resume from another checkpoint, or start a new "
            "run from the checkpoint's weights."
        ) from None


def _check_numbers(values: Mapping[str, object]) -> None:
    for name, value in values.items():
        if not isinstance(value, (int, float, type(None))):
            raise TypeError(f"{name} is {value!r}")


def _say_changes(before: Progress, now: Progress) -> None:
    """What a run is resumed with that is not as it was, field by field."""
    was, is_now = asdict(before.config), asdict(now.config)
    was |= {"metric": before.watch.key, "greater_is_better": before.watch.greater_is_better, "seed": before.seed}
    is_now |= {"metric": now.watch.key, "greater_is_better": now.watch.greater_is_better, "seed": now.seed}
    changed = [f"`{name}` {is_now[name]!r} (was {was[name]!r})" for name in was if is_now[name] != was[name]]
    if changed:
        logger.warning(
            "Resuming with other resets than the checkpoint was written with: %s. The run goes on with the new "
            "ones, and is not the one that it would have been.",
            ", ".join(changed),
        )
    if before.watch.key != now.watch.key or before.watch.greater_is_better != now.watch.greater_is_better:
        logger.warning(
            "The best %s of before says nothing about %s: it is not kept. Resets begin anew, once evaluations have "
            "chosen an anchor by it.",
            before.watch.key,
            now.watch.key,
        )
    if before.world_size != now.world_size and now.watch.key.endswith("loss"):
        logger.warning(
            "Resuming with %s processes a run of %s. Where a model's loss ignores `num_items_in_batch`, Trainer "
            "scales it by their number, so that %r and its best value may not be comparable. Choose another "
            "`metric`, such as an accuracy, or start from the weights alone.",
            now.world_size,
            before.world_size,
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
