"""The runs of a study: where they are kept, the loop over arms and seeds, and training, watching and saving one.

Kept free of torch at import, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from hf_reset.errors import ConfigError
from hf_reset.study.arms import Arm, planned_runs

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

    from hf_reset.report.results import Results
    from hf_reset.study.options import RecipeArguments
    from hf_reset.training.best_weights import BestWeightsCallback
    from hf_reset.training.trainer import ResetTrainerMixin


def open_study(
    recipe: str, options: RecipeArguments, training: Any, configuration: dict[str, object]
) -> tuple[Results, list[tuple[Arm, int]], Callable[[str], None]]:
    """Where a study keeps its records, the runs it consists of, and how it tells of its progress (on one process).

    Args:
        recipe: its name.
        options: the recipe's.
        training: the trainer's arguments.
        configuration: see `options.parse_recipe`.

    Raises:
        ConfigError: `load_best_model_at_end` is set; or see `planned_runs`; or the output directory has a
            run in it that is not to be taken up.
    """
    from hf_reset.report.environment import environment_record
    from hf_reset.report.results import Results

    if training.load_best_model_at_end:
        raise ConfigError(
            "`load_best_model_at_end` is True, and this recipe measures the last weights as well as the best. Leave "
            "it False; the best evaluated weights are kept in memory."
        )
    runs = planned_runs(
        options.seeds,
        compare=options.compare,
        resets=training.reset_config().can_reset,
        refines=training.reset_refine != "off",
    )
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


def save_whole_model(trainer: Trainer, path: str) -> None:
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
    runs: Sequence[tuple[Arm, int]],
    run_one: Callable[[Arm, int], Mapping[str, object]],
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Run each (arm, seed) that has no record yet, and keep its record at once.

    Args:
        results: where records are kept.
        runs: see `arms.planned_runs`.
        run_one: trains and measures one arm from one seed; its record lacks only `arm` and `seed`.
        say: how progress is told.
    """
    for number, (arm, seed) in enumerate(runs, start=1):
        where = f"[{number}/{len(runs)}] {arm.name}, seed {seed}"
        if results.has(arm.name, seed):
            say(f"{where}: recorded already, skipped")
            continue
        say(f"{where}: training")
        results.add({"arm": arm.name, "seed": seed, **run_one(arm, seed)})


def study_callbacks(training_arguments: TrainingArguments, results: Results) -> list[TrainerCallback]:
    """What every run of a study is watched by.

    The results file, with the configuration, is there from the first step on: a study that is taken up in its first
    run is held to it. Progress shows as `quiet_unless_terminal` says.

    Args:
        training_arguments: `disable_tqdm` is set where there is no terminal.
        results: of the study.

    Returns:
        Callbacks to hand to each Trainer.
    """
    from transformers import TrainerCallback

    class ResultsFromTheStart(TrainerCallback):
        def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
            results.save()

    return [ResultsFromTheStart(), *quiet_unless_terminal(training_arguments)]


def quiet_unless_terminal(training_arguments: TrainingArguments) -> list[TrainerCallback]:
    """Progress in bars on a terminal; elsewhere (a log file, CI) in a line an evaluation.

    Args:
        training_arguments: `disable_tqdm` is set where there is no terminal.

    Returns:
        Callbacks to hand to each Trainer.
    """
    from datasets import disable_progress_bars
    from transformers import TrainerCallback
    from transformers.utils.logging import disable_progress_bar

    class EvaluationLines(TrainerCallback):
        def on_evaluate(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
            if state.is_world_process_zero and state.max_steps:
                loss = kwargs.get("metrics", {}).get("eval_loss", float("nan"))
                print(f"  step {state.global_step}/{state.max_steps}: validation loss {loss:.4f}", flush=True)

    if sys.stderr.isatty():
        return []
    disable_progress_bars()
    disable_progress_bar()
    training_arguments.disable_tqdm = True
    return [EvaluationLines()]


def resume_point(training: TrainingArguments, args: TrainingArguments) -> str | None:
    """The newest whole checkpoint of one run, when the study is taken up again.

    Args:
        training: the study's arguments; resumed if its `resume_from_checkpoint` is set.
        args: the run's, from `arguments_of`.
    """
    from hf_reset.training.checkpoints import last_whole_checkpoint

    if training.resume_from_checkpoint is None:
        return None
    return last_whole_checkpoint(args.output_dir or "", world_size=args.world_size)


def best_weights(args: Any) -> BestWeightsCallback:
    """Keeps a run's best evaluated weights, which every arm is measured by; in a file too, where the run saves."""
    from hf_reset.training.best_weights import BestWeightsCallback

    path = None if args.save_strategy == "no" else f"{args.output_dir}/best_weights.safetensors"
    return BestWeightsCallback(args.reset_config(), path=path)


def train_run(trainer: Trainer, training: TrainingArguments) -> dict[str, float]:
    """Train one run, from where it was if the study is taken up again, and say what it cost.

    Args:
        trainer: of the run.
        training: the study's arguments.

    Returns:
        `train_seconds`, and `peak_memory_bytes`.
    """
    from transformers import PrinterCallback

    from hf_reset.report.environment import peak_memory_bytes, reset_peak_memory

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
        best: see `best_weights`.
        curves: name of a curve in the record to its key in the log history; those without a point are left out.
    """
    from hf_reset.report.results import series

    callback, log = trainer.reset_callback, trainer.state.log_history
    return {
        "can_reset": callback.config.can_reset,
        "resets": callback.reset_state.resets,
        "armed_step": callback.reset_state.armed_step,
        "armed_margin": callback.reset_state.armed_margin,
        "reset_steps": [event["step"] for event in callback.events if event["kind"] == "reset"],
        "steps": trainer.state.global_step,
        "best_step": best.step,
        "best_metric": best.best,
        "suspects_share": suspects_share(trainer),
        "why_not_refined": why_not_refined(trainer),
        "history": {name: curve for name, key in curves.items() if (curve := series(log, key))},
    }


def without_metrics(trainer: Trainer) -> None:
    """Let what is predicted from here on be, without the metrics of validation."""
    trainer.compute_metrics = None  # pyright: ignore[reportAttributeAccessIssue]


def why_not_refined(trainer: Trainer) -> str | None:
    """Why a run that was to refine labels touched none at its end; None where it did, or was not to."""
    refinement, config = getattr(trainer, "refinement", None), getattr(trainer, "refinement_config", None)
    if config is None or config.mode == "off" or (refinement is not None and refinement.is_active):
        return None
    return "Validation never stalled." if refinement is None else refinement.reason


def suspects_share(trainer: ResetTrainerMixin) -> float | None:
    """Share of the judged training rows whose label a run believes wrong; None where it judged none."""
    from hf_reset.errors import DataError

    try:
        table = trainer.suspects()
    except DataError:
        return None
    return float(table.loc[table["rank"].notna(), "is_label_issue"].mean())


def save_final_model(
    trainer: Any,
    finish: Literal["anchor", "last"],
    best: BestWeightsCallback,
    path: str,
    record: Mapping[str, object] | None = None,
    options: object = None,
) -> None:
    """Save the last weights, or the anchor's (without resets: the best evaluated), as training would end with `finish`.

    An anchor of a part of the model was not evaluated beside the last step's rest. Where it does not hold the rest that
    was, all weights are those of the best evaluation, which is the anchor's unless that was fixed earlier.

    Args:
        trainer: a `ResetTrainer`, after training.
        finish: the study's `reset_finish`.
        best: see `best_weights`.
        path: directory to save to.
        record: of the run, for the model's card; None for no card.
        options: the text-classification recipe's, for the card.
    """
    from hf_reset.policy import finishes_with_anchor

    callback = trainer.reset_callback
    store = callback.store
    anchor = store.swapped() if store is not None and store.holds_all else best.swapped()
    with_anchor = finishes_with_anchor(replace(callback.config, finish=finish), callback.reset_state)
    with anchor if with_anchor else nullcontext():
        save_whole_model(trainer, path)
    if record is not None and trainer.args.should_save:
        from hf_reset.report.classification import write_card

        write_card(path, [record], {**vars(options), "reset_finish": finish})
