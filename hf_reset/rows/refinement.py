"""What to train on in place of labels that the row memory believes wrong, and the limits to that belief."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_reset.errors import ConfigError
from hf_reset.rows.confident import estimate_noise
from hf_reset.rows.memory import RowMemory
from hf_reset.rows.responses import ResponseMemory
from hf_reset.rows.suspects import lowest, lowest_of_each_class

MODES = ("off", "soft", "drop", "mix")
BEGINNINGS = ("stall", "resets")


@dataclass(frozen=True)
class RefinementConfig:
    """How suspects' labels are treated once the row memory can judge them."""

    mode: str = "off"
    """"off"; "soft": suspects are trained towards what the memory predicts for them; "mix": towards a mixture of that
    and their given label; "drop": they are left out. Responses have no such prediction: "soft" and "mix" weigh their
    loss by `suspect_weight`, "drop" leaves them out."""
    begin: str = "stall"
    """"stall": once two evaluations in a row brought no new best, or resets have begun. These wait for evidence that
    validation has turned, which can come late in a run, when there has long been much to correct; while validation
    still improves, mean predictions of the past would hold the model back. Responses are judged before training, and
    treated accordingly from the first step on. "resets": not before resets have begun, which is so in any case where
    there are no validation logits to judge a classifier by."""
    min_visits: int = 2
    """No label is touched before every row was seen so often. (Responses are looked at before training.)"""
    decay: float = 0.8
    """γ of the memory, in (0, 1]: what a row's visit weighs after each later one. 1 is the plain mean."""
    noise_rate: float | None = None
    """The share of wrong labels, where it is known: at most that many rows are touched. None: it is estimated."""
    min_class_share: float = 0.1
    """The share of each given class's rows, in (0, 1], that is never touched, one row at least."""
    mix: float = 0.5
    """In mode "mix", the given label's part of the target, in [0, 1]."""
    suspect_weight: float = 0.2
    """What the loss of a suspect response counts for, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.begin not in BEGINNINGS:
            raise ConfigError(f"`begin` must be one of {', '.join(BEGINNINGS)}, got {self.begin!r}.")
        if self.min_visits < 1:
            raise ConfigError(f"`min_visits` must be at least 1, got {self.min_visits}. 2 is the default.")
        for name in ("mix", "suspect_weight", "noise_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"`{name}` must be in [0, 1], got {value}.")
        for name in ("decay", "min_class_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"`{name}` must be in (0, 1], got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class Refinement:
    """What to do with each of N rows, until it is judged again."""

    is_suspect: Tensor
    """(N,), bool: the rows whose given label is not trusted."""
    weights: Tensor
    """(N,), float32: what each row's loss counts for; 1 but for suspects that are dropped or weighed down."""
    targets: Tensor | None
    """(N, K), float32, rows summing to 1: what suspects are trained towards, the given label elsewhere (all 0 where
    a row has none). None where the given labels stay."""
    reason: str
    """What was decided and why, in a sentence."""

    @property
    def is_active(self) -> bool:
        """Whether any row is treated otherwise than given."""
        return bool(self.is_suspect.any())


def refine(
    memory: RowMemory,
    config: RefinementConfig,
    *,
    fitted_noise: float = 0.0,
    estimated_accuracy: float | None = None,
    in_training: Tensor | None = None,
) -> Refinement:
    """Judge each row's label by the memory, within limits that keep a wrong judgement from spreading.

    Suspects are rows whose mean margin is below 0, the lowest first. Of all rows at most the noise found is
    touched, of each given class at most the noise found in it, and never all of a class (`min_class_share`). The
    noise found is `fitted_noise`, which sees uniform noise, unless confident learning, which sees one class taken for
    another, finds more than twice as much in the memory; or it is `config.noise_rate`.

    Nothing is touched while a row has been seen fewer than `config.min_visits` times, nor while the model, or the
    memory, is right less often than the labels are: where noise is uniform, as far as `estimated_accuracy` and
    `memory_accuracy` tell.

    Args:
        memory: After `share`.
        config: Which rows, and what is done with them.
        fitted_noise: Share of wrong labels that the validation rows show (`CalibratedLoss.wrong_labels`, the
            metric "label_noise"); 0 or NaN: not known.
        estimated_accuracy: Of the model on right labels, from the same fit (`CalibratedLoss.estimated_accuracy`);
            None: not known.
        in_training: Which rows are trained on, (N,), bool; None: all of them. Rows that have no label (−100)
            are not.

    Returns:
        A `Refinement`; while it waits not active, and with the reason.

    Raises:
        ConfigError: Mode "soft" or "mix", and the memory keeps no class probabilities.
        DataError: More classes than rows.
    """
    if config.mode == "off":
        return _nothing(memory.num_rows, "Refinement is off.")
    if config.mode in ("soft", "mix") and not memory.keeps_probabilities:
        raise ConfigError(
            f'`mode` "{config.mode}" trains towards mean predictions, and those of {memory.num_rows} rows and '
            f'{memory.num_classes} classes are over the row memory\'s bound. Raise its `max_bytes`, or use "drop".'
        )
    reason = _unseen(memory.visits, in_training, config.min_visits)
    if reason:
        return _nothing(memory.num_rows, reason)
    rate, class_rates, is_uniform = _noise_found(memory, config, fitted_noise)
    # Where noise is not uniform, the fit takes it for doubt of the model's, and its accuracy says nothing.
    for name, accuracy in (("model", estimated_accuracy), ("memory", memory_accuracy(memory, rate))):
        if is_uniform and accuracy is not None and not accuracy > 1 - rate:
            return _nothing(
                memory.num_rows, f"The {name} seems right in {accuracy:.0%} of the rows, the labels in {1 - rate:.0%}."
            )
    is_suspect = _suspects(memory, config, rate, class_rates)
    return _treated(memory, config, is_suspect, f"{rate:.0%} of the labels look wrong.")


def refine_responses(memory: ResponseMemory, config: RefinementConfig) -> Refinement:
    """Weigh down the responses that their prompts do not help to foresee.

    Suspects have the highest ratio of the loss behind their own prompt to that behind another's: as many as
    `config.noise_rate` says, or else the memory's `estimated_noise`.

    Args:
        memory: With the losses before training set.
        config: Mode "drop" leaves suspects out, "soft" and "mix" weigh their loss by `suspect_weight`.

    Returns:
        A `Refinement` without targets.
    """
    if config.mode == "off":
        return _nothing(memory.num_rows, "Refinement is off.")
    ratios = memory.ratios.double().numpy()
    rate = memory.estimated_noise if config.noise_rate is None else config.noise_rate
    is_judged = ~np.isnan(ratios)
    is_suspect = torch.from_numpy(lowest(-ratios, is_judged, round(rate * is_judged.sum())))
    weight = 0.0 if config.mode == "drop" else config.suspect_weight
    weights = torch.where(is_suspect, weight, 1.0)
    return Refinement(is_suspect, weights, None, f"{rate:.0%} of the responses look misplaced.")


def memory_accuracy(memory: RowMemory, noise_rate: float) -> float:
    """How often the memory's most probable class is the right one, from how often it is the given one.

    With uniform noise at rate τ, predictions that are right with probability q agree with the given labels in
    a = q (1 − τ) + (1 − q) τ / (K − 1) of the rows, if they do not know them: q is solved for. Labels that were learnt
    by heart make it too high.

    Args:
        memory: after `share`.
        noise_rate: τ, in [0, 1].

    Returns:
        q in [0, 1]; NaN where no row was visited, or labels tell nothing (τ at (K − 1) / K or above).
    """
    labelled = (memory.labels >= 0) & memory.visits.gt(0)
    by_chance = noise_rate / (memory.num_classes - 1)
    if not labelled.any() or noise_rate + by_chance >= 1:
        return math.nan
    agreement = float((memory.margins[labelled] > 0).double().mean())
    return min(1.0, max(0.0, (agreement - by_chance) / (1 - noise_rate - by_chance)))


def _nothing(num_rows: int, reason: str) -> Refinement:
    return Refinement(torch.zeros(num_rows, dtype=torch.bool), torch.ones(num_rows), None, reason)


def _unseen(visits: Tensor, in_training: Tensor | None, min_visits: int) -> str:
    """Why it must wait for visits, or nothing."""
    is_waiting = visits < min_visits
    if in_training is not None:
        is_waiting &= in_training.to(visits.device)
    count = int(is_waiting.sum())
    return f"{count} rows were seen fewer than {min_visits} times." if count else ""


def _noise_found(
    memory: RowMemory, config: RefinementConfig, fitted_noise: float
) -> tuple[float, NDArray[np.float64], bool]:
    """Share of wrong labels, the same of each given class (K,), and whether uniform noise accounts for it."""
    fitted = 0.0 if math.isnan(fitted_noise) else fitted_noise
    if memory.keeps_probabilities:
        estimate = estimate_noise(memory.probabilities, memory.labels.long())
        rate, class_rates = estimate.rate, np.nan_to_num(estimate.class_rates)
    else:
        rate, class_rates = 0.0, np.zeros(memory.num_classes)
    is_uniform = 2 * fitted >= rate
    rate = fitted if is_uniform else rate  # a memory that is often wrong itself makes confident learning's too high
    rate = rate if config.noise_rate is None else config.noise_rate
    return rate, np.maximum(class_rates, rate), is_uniform


def _suspects(
    memory: RowMemory, config: RefinementConfig, rate: float, class_rates: NDArray[np.float64]
) -> NDArray[np.bool_]:
    margins, labels = memory.margins.double().numpy(), memory.labels.long().numpy()
    counts = np.bincount(labels[labels >= 0], minlength=memory.num_classes)
    spared = np.maximum(np.ceil(config.min_class_share * counts), 1)
    allowed = np.minimum(np.rint(class_rates * counts), counts - spared)
    chosen = lowest_of_each_class(margins, labels, margins < 0, allowed)
    return lowest(margins, chosen, round(rate * counts.sum()))


def _treated(memory: RowMemory, config: RefinementConfig, is_suspect: NDArray[np.bool_], reason: str) -> Refinement:
    suspect = torch.from_numpy(is_suspect)
    if config.mode == "drop":
        return Refinement(suspect, (~suspect).float(), None, reason)
    targets = torch.zeros(memory.num_rows, memory.num_classes)
    rows = torch.nonzero(memory.labels >= 0)[:, 0]
    targets[rows, memory.labels[rows].long()] = 1.0
    given = config.mix if config.mode == "mix" else 0.0
    targets[suspect] = given * targets[suspect] + (1 - given) * memory.probabilities[suspect]
    return Refinement(suspect, torch.ones(memory.num_rows), targets, reason)
