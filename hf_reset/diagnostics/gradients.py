"""The risk gradient's correct and wrong parts over training, so that the latent bias can be seen to grow.

With N rows of which some carry a wrong label, the gradient of the training risk is the sum of a correct and a wrong
part, (1/N) Σ_correct ∇ℓ(x, y) + (1/N) Σ_wrong ∇ℓ(x, ỹ). The paper (Bae, Song, Jeong 2025, arXiv 2406.00396, section 2)
takes the two drifts as near orthogonal, and the wrong one as small at first and growing along the trajectory: here
both are measured. `theory.langevin.decompose` says what follows where they are not orthogonal.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_reset.anchor.scopes import named_parameters, select_parameters, unwrapped
from hf_reset.diagnostics.diffusion import NoiseScale, noise_scale_of_strata
from hf_reset.diagnostics.label_memory import accepted_columns, default_collator_of
from hf_reset.diagnostics.modes import evaluation_mode, generators_kept, refuse_sharded
from hf_reset.errors import DataError, ScopeError, refuse_below_one
from hf_reset.losses.by_name import cross_entropy, logits_of, shifts_labels
from hf_reset.planner.excursions import Entry

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Unpack

    from hf_reset.rows.identity import Collator
    from hf_reset.training.hooks import HookKeywords

Gradient: TypeAlias = dict[str, Tensor]

_FLAGS = ("is_mislabelled", "is_corrupted")
_LABELS = ("labels", "label")
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class GradientParts:
    """One layer group's gradient, in its two parts.

    Attributes:
        correct_norm: Euclidean norm of the correct part, in units of the loss per length.
        wrong_norm: of the wrong part.
        cosine: of the angle between them; 0 in the paper.
        correct_along_path: what the correct part pushes (its negative) along the unit vector of the path travelled;
            NaN before there is one.
        wrong_along_path: the same of the wrong part: the latent bias in the direction taken.
    """

    correct_norm: float
    wrong_norm: float
    cosine: float
    correct_along_path: float
    wrong_along_path: float


def layer_groups(model: nn.Module) -> dict[str, list[str]]:
    """Names of trainable parameters by group: "below" the blocks, "block 0", …, and the "head"."""
    named = {name: p for name, p in named_parameters(unwrapped(model)).items() if p.requires_grad}
    try:
        head = set(select_parameters(model, "head"))
    except ScopeError:
        head = set()
    groups: dict[str, list[str]] = {}
    for name in named:
        block = _BLOCK.search(name)
        group = "head" if name in head else f"block {block.group(1)}" if block else "below"
        groups.setdefault(group, []).append(name)
    return groups


def gradient_parts(
    correct: Gradient, wrong: Gradient, path: Gradient | None, groups: Mapping[str, Sequence[str]]
) -> dict[str, GradientParts]:
    """Norms, cosine and projections, for "all" and for each group.

    Args:
        correct: the correct part by parameter name.
        wrong: the wrong part, same names and shapes.
        path: the way travelled, θ − θ_start, likewise; None for none.
        groups: names of each group.
    """
    return {group: _parts_of(correct, wrong, path, names) for group, names in {"all": list(correct), **groups}.items()}


def risk_gradient(
    model: nn.Module, batches: Sequence[tuple[dict[str, Tensor], Tensor]], rows: int
) -> tuple[Gradient, list[float]]:
    """Gradient of Σ loss / `rows` over batches of inputs and labels, by parameter name.

    The model's own `.grad` fields, its mode and the random generators are left alone; dropout is off.

    Args:
        model: the model, not sharded.
        batches: inputs, and labels (N,) or (N, T) with −100 where there is none.
        rows: what the sum is divided by: labels in all parts of the risk together.

    Returns:
        The gradient, and each batch's squared norm of its *mean* gradient (over its labels).
    """
    inner = unwrapped(model)
    named = {name: p for name, p in named_parameters(inner).items() if p.requires_grad}
    shift = shifts_labels(inner)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    squares = []
    device = next(inner.parameters()).device
    with evaluation_mode(inner), generators_kept(device), torch.enable_grad():
        for inputs, labels in batches:
            outputs = inner(**{name: tensor.to(device) for name, tensor in inputs.items()})
            loss = cross_entropy(logits_of(outputs), labels.to(device), num_items_in_batch=1.0, shift=shift or None)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            count, square = label_count(labels, shift=shift), 0.0
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    total[name] += gradient.float() / rows
                    square += float((gradient.float() / max(count, 1)).square().sum())
            squares.append(square)
    return total, squares


def label_count(labels: Tensor, *, shift: bool) -> int:
    """Labels that take part: not −100, and not the first of a sequence where labels move by one."""
    return int(((labels[..., 1:] if shift else labels) != -100).sum())


class GradientPartsCallback(TrainerCallback):
    """Every k optimizer steps, the correct and the wrong part of the risk gradient on a fixed sample.

    Writes to `state.log_history` a record with `step`, `epoch`, "gradient/correct_norm", "gradient/wrong_norm",
    "gradient/cosine", "gradient/correct_along_path", "gradient/wrong_along_path", the same for each layer group as
    "gradient/GROUP/…", "gradient/noise_scale" and "gradient/variance" (see `diffusion.noise_scale_of_strata`), and
    "gradient/seconds" that this took. The path is that from where training began, or was resumed.

    Cost: a forward and a backward of `sample` rows every k steps, so sample/(k·batch size) of the training; and
    three copies of the trainable weights in memory, one all along. The training goes on bit for bit as without.

    Args:
        dataset: tokenized training rows with labels as trained on and `is_mislabelled` (or `is_corrupted`).
        every: k, in optimizer steps.
        sample: rows, correct and wrong in the proportion of the set.
        seed: selects the sample.
        data_collator: makes a batch of rows, labels included. Default: pads with the Trainer's tokenizer, or stacks.
        batch_size: rows a forward; also the "small batch" of the noise scale.

    Raises:
        ConfigError: `every`, `sample` or `batch_size` is below 1.
        DataError: a column is missing, or there are no wrong or no correct rows.
        UnsupportedError: when training begins with sharded weights, whose gradients no rank has whole.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        every: int = 50,
        sample: int = 256,
        seed: int = 0,
        data_collator: Collator | None = None,
        batch_size: int = 32,
    ) -> None:
        refuse_below_one(every=every, sample=sample, batch_size=batch_size)
        self.every, self.batch_size, self.data_collator = every, batch_size, data_collator
        self.parts = _stratified(dataset, sample, seed)
        self._batches: list[list[tuple[dict[str, Tensor], Tensor]]] = []
        self._start: Gradient = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Make the batches once, and remember where the path begins."""
        model = kwargs["model"]
        refuse_sharded(model, "GradientPartsCallback")
        collate = self.data_collator or default_collator_of(kwargs.get("processing_class"))
        with generators_kept(args.device):
            self._batches = [_batched(part, model, collate, self.batch_size) for part in self.parts]
        self._groups = layer_groups(model)
        named = named_parameters(unwrapped(model))
        self._start = {name: p.detach().float().clone() for name, p in named.items() if p.requires_grad}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Unpack[HookKeywords]
    ) -> None:
        """Measure and record, where the step is one of every k."""
        if state.global_step % self.every == 0:
            state.log_history.append({**self.measure(kwargs["model"]), "epoch": state.epoch, "step": state.global_step})

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The record's figures for the model as it is."""
        began = time.perf_counter()
        shift = shifts_labels(unwrapped(model))
        counts = [sum(label_count(labels, shift=shift) for _, labels in part) for part in self._batches]
        found = [risk_gradient(model, part, sum(counts)) for part in self._batches]
        (correct, correct_squares), (wrong, wrong_squares) = found
        named = named_parameters(unwrapped(model))
        path = {name: named[name].detach().float() - start for name, start in self._start.items()}
        record: dict[str, float] = {}
        for group, parts in gradient_parts(correct, wrong, path, self._groups).items():
            prefix = "gradient/" if group == "all" else f"gradient/{group}/"
            record |= {prefix + name: value for name, value in asdict(parts).items() if math.isfinite(value)}
        scale = self._noise_scale((correct, wrong), (correct_squares, wrong_squares), counts)
        if scale is not None:
            record |= {"gradient/noise_scale": scale.scale, "gradient/variance": scale.variance}
        return {**record, "gradient/seconds": time.perf_counter() - began}

    def _noise_scale(
        self, gradients: Sequence[Gradient], squares: Sequence[list[float]], counts: list[int]
    ) -> NoiseScale | None:
        """None for sequences, whose rows have no single label, and where a part has fewer than two whole batches."""
        if any(labels.ndim != 1 for part in self._batches for _, labels in part):
            return None
        whole = [n // self.batch_size for n in counts]
        if min(whole) < 2:
            return None
        total, n = {name: a + gradients[1][name] for name, a in gradients[0].items()}, sum(counts)
        means = [_square(part) * (n / count) ** 2 for part, count in zip(gradients, counts, strict=True)]
        small = [float(np.mean(part[:m])) for part, m in zip(squares, whole, strict=True)]
        return noise_scale_of_strata(small, means, counts, self.batch_size, _square(total))


def plot_gradients(log_history: Sequence[Entry], path: str | Path) -> Path:
    """Draw norms, cosine and the push along the path over training, the cosine by group too; returns the path.

    Raises:
        DataError: the log has no record of `GradientPartsCallback`.
    """
    records = [record for record in log_history if "gradient/cosine" in record]
    if not records:
        raise DataError("The log has no gradient records. Train with `diagnostics.GradientPartsCallback`.")
    from hf_reset.report.plots import curves_figure

    groups = sorted({key.split("/")[1] for key in records[-1] if key.count("/") == 2}, key=_natural)
    panels = [
        ("Norm of the two parts", "loss per length", {n: f"gradient/{n}_norm" for n in ("correct", "wrong")}),
        ("Push along the path", "loss per length", {n: f"gradient/{n}_along_path" for n in ("correct", "wrong")}),
        ("Angle between them", "cosine", {"all": "gradient/cosine", **{g: f"gradient/{g}/cosine" for g in groups}}),
    ]
    return curves_figure(records, panels, path)


def _parts_of(correct: Gradient, wrong: Gradient, path: Gradient | None, names: Sequence[str]) -> GradientParts:
    norms = [math.sqrt(sum(float(part[name].square().sum()) for name in names)) for part in (correct, wrong)]
    dot = sum(float((correct[name] * wrong[name]).sum()) for name in names)
    length = math.sqrt(sum(float(path[name].square().sum()) for name in names)) if path else 0.0
    along = [math.nan, math.nan]
    if path and length > 0:
        along = [-sum(float((p[name] * path[name]).sum()) for name in names) / length for p in (correct, wrong)]
    cosine = dot / (norms[0] * norms[1]) if all(norms) else math.nan
    return GradientParts(norms[0], norms[1], cosine, along[0], along[1])


def _stratified(dataset: Dataset, sample: int, seed: int) -> tuple[Dataset, Dataset]:
    """A fixed sample of correct rows and one of wrong rows, in the proportion of the set."""
    flag = next((name for name in _FLAGS if name in dataset.column_names), None)
    if flag is None or not any(name in dataset.column_names for name in _LABELS):
        raise DataError(
            f"`dataset` needs labels and `is_mislabelled` (or `is_corrupted`); it has "
            f"{', '.join(dataset.column_names)}. Corrupt labels with `noise.corrupt_labels`, which adds the flag."
        )
    wrong = np.asarray(dataset.select_columns(flag).with_format("numpy")[:][flag], dtype=bool)
    if wrong.all() or not wrong.any():
        raise DataError(f"{int(wrong.sum())} of {len(wrong)} rows of `dataset` are wrong: there are no two parts.")
    chosen = np.random.default_rng(seed).permutation(len(wrong))[:sample]
    correct, false = (np.sort(chosen[wrong[chosen] == value]) for value in (False, True))
    if not len(correct) or not len(false):
        raise DataError(f"A `sample` of {sample} rows has none of one part. Take a larger one.")
    return dataset.select(correct), dataset.select(false)


def _batched(rows: Dataset, model: nn.Module, collate: Collator, size: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Inputs and labels of each batch."""
    label = next(name for name in _LABELS if name in rows.column_names)
    accepted = accepted_columns(model, rows.column_names)
    whole = rows.select_columns([*accepted, label]).with_format(None).to_list()
    batches = []
    for start in range(0, len(whole), size):
        batch = collate(whole[start : start + size])
        labels = next(batch[name] for name in (*_LABELS, "label_ids") if name in batch)
        batches.append(({name: batch[name] for name in accepted}, torch.as_tensor(labels)))
    return batches


def _square(gradient: Gradient) -> float:
    return sum(float(part.square().sum()) for part in gradient.values())


def _natural(group: str) -> tuple[int, str]:
    number = group.split()[-1]
    return (int(number) if number.isdigit() else -1 if group == "below" else 10**6, group)
