"""Which set-ups evaluations can be raced in, and where they take place: refusals in words, and excursions' ends."""

from __future__ import annotations

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.optimization import GreedyLR

from hf_reset.errors import ConfigError, UnsupportedError
from hf_reset.metrics.evaluation import CalibratedMetrics
from hf_reset.training.callback import StochasticResetCallback
from hf_reset.training.hooks import resets_of
from hf_reset.training.metric import MetricWatch
from hf_reset.training.validation import CALIBRATED, has_class_rows

PLAIN = "eval_loss"
RACED = (f"eval_{CALIBRATED}", PLAIN)


def refuse_unraceable(trainer: Trainer, resets: StochasticResetCallback) -> None:
    """When training begins: what cannot be had with `reset_evaluation="paired"` or `reset_evaluation_at="excursion"`.

    Raises:
        ConfigError: it would have no effect, or contradicts another setting.
        UnsupportedError: evaluations have no losses of rows to race by, or something chooses by figures of all rows.
    """
    if getattr(trainer.args, "reset_evaluation_at", "schedule") == "excursion":
        _refuse_excursions(trainer.args, resets)
    if getattr(trainer.args, "reset_evaluation", "full") != "paired":
        return
    if not resets.config.needs_anchor:
        raise ConfigError(
            '`reset_evaluation="paired"` asks whether weights beat the anchor, and this run keeps none: `probability` '
            'is 0 and `finish` is "last". Set one of them, or `reset_evaluation` to "full".'
        )
    if resets.config.smooth:
        raise ConfigError(
            '`reset_evaluation="paired"` ends an evaluation that cannot beat the anchor by itself, so there is '
            'nothing to average with: set `smooth` (`reset_smooth`) to False, or `reset_evaluation` to "full".'
        )
    reason = _no_rows(trainer, resets) or _wants_all_rows(trainer)
    if reason is not None:
        raise UnsupportedError(f'`reset_evaluation="paired"` cannot be had: {reason}, or set it to "full".')


class ExcursionEvaluations(TrainerCallback):
    """Once resets have begun, evaluations take place where excursions end, in place of the Trainer's schedule.

    Before the step that a reset will discard, the excursion has gone as far as it will. The last evaluation of training
    stays. `ResetTrainer` adds it under `reset_evaluation_at="excursion"`, behind the Trainer's own flow.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluate here, if the next step ends in a reset."""
        resets = self._at_work(args, state)
        if resets is not None:
            step = state.global_step
            control.should_evaluate = resets.resets_at(step) and not resets.is_at_anchor(step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """An epoch's end is no excursion's."""
        if self._at_work(args, state) is not None:
            control.should_evaluate = False

    def _at_work(self, args: TrainingArguments, state: TrainerState) -> StochasticResetCallback | None:
        """The reset callback, once resets have begun, up to the last step."""
        resets: StochasticResetCallback | None = resets_of(state)
        is_asked = getattr(args, "reset_evaluation_at", "schedule") == "excursion"
        if resets is None or not is_asked or not resets.reset_state.armed or state.global_step >= state.max_steps:
            return None
        return resets


def _refuse_excursions(args: TrainingArguments, resets: StochasticResetCallback) -> None:
    what = '`reset_evaluation_at="excursion"`'
    if not resets.config.can_reset:
        raise ConfigError(f"{what} has no effect where no step can end in a reset. Set a `probability` above 0.")
    if resets.config.probability == "auto":
        raise ConfigError(
            f'{what} waits for resets, and `probability` "auto" chooses how many fall between two evaluations. Give a '
            "probability."
        )
    if args.load_best_model_at_end:
        raise ConfigError(
            f"{what} evaluates elsewhere than checkpoints are saved, so `load_best_model_at_end` could not tell which "
            'of these is best. Turn it off: `reset_finish="anchor"` ends with the best evaluated weights.'
        )


def _no_rows(trainer: Trainer, resets: StochasticResetCallback) -> str | None:
    """Why evaluations have no losses of rows to race by, with the remedy; None where they have."""
    args, dataset = trainer.args, trainer.eval_dataset
    key = MetricWatch.of(resets.config, args, default=resets.default_metric).key
    if isinstance(dataset, dict):
        return "`eval_dataset` is a dict, and an anchor's rows are those of one set. Pass the set that is to choose"
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return (
            f"`eval_dataset` is a {type(dataset).__name__}, whose rows have no order to be met in. Pass one with a "
            "length and indices"
        )
    for name, bad in (("prediction_loss_only", True), ("batch_eval_metrics", True), ("eval_do_concat_batches", False)):
        if getattr(args, name) is bad:
            return f"`{name}` is {bad}, and rows are told apart by their logits, all at the end. Set it to {not bad}"
    if trainer.preprocess_logits_for_metrics is not None:
        return "`preprocess_logits_for_metrics` may leave no logits. Leave it out"
    if not has_class_rows(trainer):
        return (
            "evaluations of this model have no loss of a single row whose mean would be the metric: only those of "
            "single-label classifiers with integer labels have (not of regression, several labels a row, or language "
            "models, whose `eval_loss` weighs rows by their tokens). Use such a model"
        )
    if key not in RACED:
        known = " or ".join(map(repr, RACED))
        return f"anchors are chosen by {key!r}, which has no rows. Choose by {known} (`reset_metric`)"
    own_loss = trainer.compute_loss_func is not None or args.label_smoothing_factor > 0
    if key == PLAIN and own_loss:
        return f"`eval_loss` is another loss than cross-entropy here. Choose anchors by {RACED[0]!r} (`reset_metric`)"
    if not isinstance(resets.rows, CalibratedMetrics) or trainer.compute_metrics is not resets.rows:
        return "`compute_metrics` was replaced, and with it what leaves the rows behind. Set it before training"
    return None


def _wants_all_rows(trainer: Trainer) -> str | None:
    """What chooses by each evaluation's figures, and would be fed by races that have none; with the remedy."""
    args = trainer.args
    if args.load_best_model_at_end:
        return (
            "`load_best_model_at_end` needs each evaluation's figures, which a lost race does not have. Turn it off: "
            '`reset_finish="anchor"` ends with the best evaluated weights'
        )
    if args.save_strategy == "best":
        return '`save_strategy="best"` needs each evaluation\'s figures, which a lost race does not have. Save by steps'
    if isinstance(trainer.lr_scheduler, (ReduceLROnPlateau, GreedyLR)):
        return (
            f"{type(trainer.lr_scheduler).__name__} sets the learning rate by each evaluation's figures, which a lost "
            "race does not have. Choose another schedule"
        )
    if any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks):
        return "EarlyStoppingCallback counts each evaluation's figures, which a lost race does not have. Leave it out"
    return None
