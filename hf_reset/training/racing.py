"""Paired racing: an evaluation ends as soon as it is clear that the candidate does not beat the anchor.

Whether weights become the anchor is all that most evaluations are asked. A race meets the validation rows in random
order, block by block (a block: one evaluation batch on each process), and holds each row's loss against the same row's
at the anchor. It is lost once an improvement of the mean by `CLEAR` standard errors is ruled out at error level
`LEVEL`, by the betting confidence sequence of `hf_reset.metrics.sequential`; the standard error is that of the paired
difference over all rows, as the rows so far let it be estimated. A race that is not lost goes to the end and is then an
evaluation like any other: a new anchor needs all its rows, so to find out early that it is won would save nothing.
Candidates of one run are alike: what a row's difference was when it was last met foretells a third to three quarters of
what it is, and only the rest has to be found out (`Reference.foreseen`).

Under "eval_calibrated_loss" a row's loss is the calibrated one, and what that fits is fitted for the candidate on the
rows met, as it was for the anchor on all rows: what their two evaluations would say, but a little kinder to the
candidate. (The anchor's temperature and noise level for both would save the fit, and hold it against a candidate that
its logits have grown: in a run on docstrings most true improvements lost their race.) Under "eval_loss" it is
cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from dataclasses import replace
from itertools import takewhile
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from hf_reset.anchor.ranks import from_first, together
from hf_reset.errors import UnsupportedError
from hf_reset.metrics.arrays import IGNORE_INDEX, to_numpy
from hf_reset.metrics.calibrated import calibrated_loss, calibrated_rows
from hf_reset.metrics.evaluation import CalibratedMetrics
from hf_reset.metrics.sequential import capital, lower_bound
from hf_reset.planner.excursions import LOST
from hf_reset.policy import TURNED
from hf_reset.training.evidence import Reference, RowEvidence
from hf_reset.training.raceable import PLAIN, ExcursionEvaluations, refuse_unraceable
from hf_reset.training.response_rows import ResponseRowsMixin

CLEAR = TURNED  # standard errors of the paired difference over all rows that a candidate is to be better by
LEVEL = 0.3  # the probability, at most, that a candidate better by that much loses its race: a bound, seldom met
FULL_EVERY = 20  # evaluations, of which one at least is carried to the end
FIRST_LOOK = 32  # rows: what is fitted on fewer says little of the others
LOOKS = 1.2  # the rows of one look at a race, as a multiple of those of the look before: each takes a fit
ROWS = "eval_race_rows"


class Race:
    """One candidate against the anchor.

    Args:
        reference: the anchor's rows.
        is_plain: whether a row's loss is cross-entropy; else the calibrated one, fitted on the rows met.
        seed: of the order of the rows, with `step`: an unlucky order costs one evaluation, not all of them.
        step: optimizer steps done.
        min_delta: how much better than the anchor's the candidate's metric is to be.

    Attributes:
        order: (N,), the rows in the order in which they are met.
        rows: how many were met.
        is_lost: whether the race is over.
    """

    def __init__(self, reference: Reference, *, is_plain: bool, seed: int, step: int, min_delta: float = 0.0) -> None:
        self.reference = reference
        self.order: NDArray[np.int64] = np.random.default_rng([seed, step]).permutation(len(reference.rows))
        self.rows = 0
        self.is_lost = False
        self._is_plain, self._min_delta = is_plain, min_delta
        self._blocks: list[np.ndarray] = []  # logits
        self._next_look = FIRST_LOOK

    def enter(self, logits: np.ndarray, labels: NDArray[np.int64]) -> bool:
        """Take in the next block, shapes (B, K) and (B,); whether the race is lost now, as this process sees it.

        Raises:
            UnsupportedError: the labels are not those of the next rows in `order`.
        """
        rows = self.order[self.rows : self.rows + len(labels)]
        if len(rows) < len(labels) or (self.reference.labels[rows] != labels).any():
            raise UnsupportedError(
                '`reset_evaluation="paired"` meets validation rows in an order of its own, and these came in another: '
                "`get_eval_dataloader` or `_get_eval_sampler` is overridden, or `eval_dataset` changed amid training. "
                'Leave them as they are, or set `reset_evaluation` to "full".'
            )
        self._blocks.append(logits)
        self.rows += len(rows)
        if not self._next_look <= self.rows < len(self.order):
            return False
        self._next_look = math.ceil(LOOKS * self.rows)
        return self._cannot_win()

    def figures(self) -> dict[str, float]:
        """What is logged: rows met, mean paired difference and its lower bound at `LEVEL`, and whether it is lost."""
        met, lowest, foreseen = self._differences()
        known = bool(len(met)) and bool(np.isfinite(met).all())
        difference = float(met.mean()) if known else math.nan
        bound = lower_bound(met, lowest, LEVEL, foreseen) if known else math.nan
        return {ROWS: self.rows, "eval_race_difference": difference, "eval_race_bound": bound, LOST: int(self.is_lost)}

    def differences(self) -> NDArray[np.float64]:
        """(N,), each row's loss less the anchor's; NaN in rows not met or without a label."""
        found = np.full(len(self.order), np.nan)
        met = self.order[: self.rows]
        found[met] = self._losses() - self.reference.rows[met]
        return found

    def in_order(
        self, compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        """`compute_metrics` of the rows in the data set's order; of a lost race it is not asked."""
        places = np.argsort(self.order)

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            if self.is_lost:
                return {}
            extra = {name: getattr(prediction, name, None) for name in ("inputs", "losses")}
            return compute_metrics(
                EvalPrediction(
                    predictions=_at(places, prediction.predictions),
                    label_ids=_at(places, prediction.label_ids),
                    **{name: _at(places, values) for name, values in extra.items() if values is not None},
                )
            )

        return compute

    def _cannot_win(self) -> bool:
        met, lowest, foreseen = self._differences()
        if not np.isfinite(met).all():
            return True  # a loss that is not finite is never a best
        if len(met) < 2:
            return False
        improvement = max(self._min_delta, CLEAR * float(met.std(ddof=1)) / math.sqrt(len(lowest)))
        return bool(capital(met, lowest, -improvement, foreseen)[-1] >= 1 / LEVEL)

    def _differences(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
        """Of labelled rows in order: differences of those met, the lowest that each can be, and what is foreseen."""
        anchor = self.reference.rows[self.order]
        is_labelled = ~np.isnan(anchor)
        # A loss is not below 0, under whatever T and ε will be fitted in the end.
        met = (self._losses() - anchor[: self.rows])[is_labelled[: self.rows]]
        foreseen = self.reference.foreseen
        return met, -anchor[is_labelled], None if foreseen is None else foreseen[self.order][is_labelled]

    def _losses(self) -> NDArray[np.float64]:
        """The candidate's losses of the rows met, in order."""
        labels = self.reference.labels[self.order[: self.rows]]
        if not (labels != IGNORE_INDEX).any():
            return np.full(self.rows, np.nan)
        logits = np.concatenate(self._blocks)
        return calibrated_rows(logits, labels, 1.0, 0.0) if self._is_plain else calibrated_loss(logits, labels).rows


class RacingMixin(ResponseRowsMixin):
    """Scheduled evaluations as races against the anchor (`reset_evaluation="paired"`), in front of any Trainer.

    Raced is what has an anchor that validation can tell from the labels' frequencies alone (`TURNED`). Carried to the
    end without a race are: every `reset_full_evaluation_every`-th evaluation since the last full one, the last of
    training, those of a hyperparameter search, and all that the user asks for. An evaluation of weights that a reset
    has just put back is not carried out: the anchor's figures answer.

    Overrides these of Trainer's private hooks: `_prepare_for_training` (refuse what cannot be raced), `_evaluate` (only
    evaluations by the schedule come through it), `_get_eval_sampler` (the order of the rows), and
    `_determine_best_metric` (a lost race is no best).
    """

    _race: Race | None = None  # the race that the next evaluation is
    _racing: Race | None = None  # the race under way
    _answer: dict[str, float] | None = None  # what the next evaluation is answered by

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; of weights just put back, the anchor's figures."""
        metrics, self._answer = self._answer, None
        if metrics is None:
            return super().evaluate(*args, **kwargs)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; as a race, it may end before the rows do."""
        race, self._race = self._race, None
        if race is None or self.compute_metrics is None:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        own, self.compute_metrics = self.compute_metrics, race.in_order(self.compute_metrics)
        self._racing = race
        try:
            output = super().evaluation_loop(cast(Any, _UntilLost(dataloader, race)), *args, **kwargs)
        finally:
            self.compute_metrics, self._racing = own, None
        if not race.is_lost:
            return output._replace(metrics={**(output.metrics or {}), **race.figures()})
        found = race.differences()
        self._foresee(found)
        self._leave_rows(found)
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=race.figures(), num_samples=race.rows)

    def prediction_step(self, model: nn.Module, inputs: dict[str, object], *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; in a race, each block decides whether there is another, on all processes alike."""
        found = super().prediction_step(model, inputs, *args, **kwargs)
        race = self._racing
        if race is not None:
            is_lost = race.enter(*self._gathered(*found[1:]))
            race.is_lost = bool(from_first(float(is_lost), self.args.device))  # floats may round apart on two machines
        return found

    # Of Trainer's own.

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        callback: Any = getattr(self, "reset_callback", None)
        with together():
            if callback is not None:
                refuse_unraceable(self, callback)
        if getattr(self.args, "reset_evaluation_at", "") == "excursion":
            self.remove_callback(ExcursionEvaluations)
            self.add_callback(ExcursionEvaluations())
        return prepared

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_paired() and trial is None:
            self._choose_how()
        try:
            metrics = super()._evaluate(trial, *args, **kwargs)
        finally:
            self._race = self._answer = None
        if self._is_paired():
            self._keep_reference(metrics)
        return metrics

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if not self._is_paired() or not hasattr(eval_dataset, "__len__"):
            return super()._get_eval_sampler(eval_dataset)
        return _RaceOrder(len(cast("Sized", eval_dataset)), lambda: self._racing)

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        return False if metrics.get(LOST) else super()._determine_best_metric(metrics, trial)

    # Steps of the above.

    def _is_paired(self) -> bool:
        asked = getattr(self.args, "reset_evaluation", "full") == "paired"
        return asked and getattr(self, "reset_callback", None) is not None

    def _evidence(self) -> RowEvidence:
        callback: Any = getattr(self, "reset_callback", None)
        return RowEvidence() if callback is None or callback.run is None else callback.run.evidence

    def _rows_source(self) -> CalibratedMetrics:
        callback: Any = getattr(self, "reset_callback", None)
        return callback.rows

    def _choose_how(self) -> None:
        """The anchor's figures, a race, or (neither set) an evaluation to the end."""
        evidence, step, callback = self._evidence(), self.state.global_step, getattr(self, "reset_callback", None)
        reference, dataset = evidence.reference, self.eval_dataset
        if callback is None or reference is None or len(reference.rows) != len(dataset):  # pyright: ignore[reportArgumentType]
            return
        if callback.is_at_anchor(step):
            self._answer = {**reference.metrics, ROWS: 0}
            self._leave_rows(np.zeros(len(reference.rows)))
            return
        lost = sum(1 for _ in takewhile(math.isnan, reversed(callback.reset_state.values)))
        is_full_due = lost + 1 >= getattr(self.args, "reset_full_evaluation_every", FULL_EVERY)
        is_told = evidence.learned is not None and evidence.learned >= TURNED
        if is_told and not is_full_due and step < self.state.max_steps:
            is_plain = callback.run.watch.key == PLAIN
            self._race = Race(
                reference,
                is_plain=is_plain,
                seed=callback.run.seed,
                step=step,
                min_delta=callback.config.min_delta,
            )

    def _leave_rows(self, differences: NDArray[np.float64]) -> None:
        """What the callback is to take for this evaluation's rows, (N,) of losses less the anchor's."""
        evidence = self._evidence()
        if evidence.anchor is not None and evidence.baseline is not None and evidence.reference is not None:
            self._rows_source().leave(evidence.anchor + differences, evidence.baseline, evidence.reference.fit)

    def _foresee(self, differences: NDArray[np.float64]) -> None:
        """Take what was found of the rows, (N,), into what the next race goes by."""
        evidence, callback = self._evidence(), cast("Any", self).reset_callback
        if evidence.reference is not None and evidence.reference.rows.shape == differences.shape:
            callback.run.evidence = replace(evidence, reference=evidence.reference.met(differences))

    def _keep_reference(self, metrics: dict[str, float]) -> None:
        """After an evaluation to the end: what the next races need of it, and all of it where the anchor moved here."""
        source, callback = self._rows_source(), getattr(self, "reset_callback", None)
        last, source.last = source.last, None
        evidence = self._evidence()
        if last is None or callback is None or callback.run is None or source.latest is None:
            return
        logits, labels = last
        rows = calibrated_rows(logits, labels, 1.0, 0.0) if callback.run.watch.key == PLAIN else source.latest.rows
        if callback.reset_state.anchor_step == self.state.global_step:
            figures = _figures_of_weights(metrics)
            reference = Reference(rows, labels, figures, source.latest)
            callback.run.evidence = replace(evidence, reference=reference)
        elif evidence.reference is not None and evidence.reference.rows.shape == rows.shape:
            self._foresee(rows - evidence.reference.rows)

    def _gathered(self, logits: object, labels: object) -> tuple[np.ndarray, NDArray[np.int64]]:
        """The block of all processes, in order and without padding: logits (B, K) and labels (B,)."""
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        block = (logits, cast("torch.Tensor", labels).reshape(-1))
        whole: Any = self.accelerator.gather_for_metrics(block)
        return to_numpy(whole[0]), to_numpy(whole[1]).astype(np.int64)


class _RaceOrder(Sampler[int]):
    """The rows of an evaluation set as they come, or in the order of the race under way."""

    def __init__(self, rows: int, race: Callable[[], Race | None]) -> None:
        self._rows, self._race = rows, race

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        race = self._race()
        return iter(range(self._rows) if race is None else race.order.tolist())


class _UntilLost:
    """A data loader that ends when the race is lost."""

    def __init__(self, loader: DataLoader, race: Race) -> None:
        self._loader, self._race = loader, race

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[object]:
        for batch in self._loader:
            yield batch
            if self._race.is_lost:
                end = getattr(self._loader, "end", None)
                if end is not None:  # accelerate's: the training loader is the one at work again
                    end()
                return


def _at(places: NDArray[np.int64], values: Any) -> Any:
    """Every array in a tree of them, with its rows at other places."""
    if isinstance(values, (tuple, list)):
        return type(values)(_at(places, value) for value in values)
    if isinstance(values, dict):
        return {name: _at(places, value) for name, value in values.items()}
    return values[places] if hasattr(values, "shape") else values


def _figures_of_weights(metrics: dict[str, float]) -> dict[str, float]:
    """The numbers among an evaluation's results that say something of the weights, not of the course it took."""
    course = ("_runtime", "_per_second", "_preparation_time", "_mem_", "eval_race_")
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and name != "epoch" and not any(part in name for part in course)
    }
