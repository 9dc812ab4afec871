"""Small models on synthetic rows with wrong labels, in a loop of one's own: a run in seconds, to study the method.

The loop is made of the pure pieces that the callback is made of: `policy.observe` and `policy.decide` say when,
`AnchorStore` goes back. Batches are drawn independently, as the Langevin picture of SGD has them, and by the seed
alone, so that all arms of a seed see the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_reset.anchor.store import AnchorStore
from hf_reset.config import ResetConfig
from hf_reset.diagnostics.gradients import GradientParts, gradient_parts, risk_gradient
from hf_reset.diagnostics.modes import evaluation_mode
from hf_reset.errors import ConfigError
from hf_reset.policy import ResetState, decide, observe
from hf_reset.theory import langevin

CLASSES = 8
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "batch": nn.BatchNorm1d,
    "rms": nn.RMSNorm,
    "none": lambda width: nn.Identity(),
}


@dataclass(frozen=True)
class Rows:
    """Rows of one split.

    Attributes:
        features: (N, ...) what the model takes.
        given: (N,) labels as training and validation see them.
        true: (N,) labels as they are.
    """

    features: Tensor
    given: Tensor
    true: Tensor

    @property
    def is_wrong(self) -> Tensor:
        """(N,), where the given label is not the true one."""
        return self.given != self.true


@dataclass(frozen=True)
class Splits:
    """Training and validation rows with wrong labels, and a clean test."""

    train: Rows
    validation: Rows
    test: Rows


def clusters(seed: int, *, noise: float, train: int = 1000, validation: int = 500, test: int = 4000) -> Splits:
    """`CLASSES` classes of two normal clusters each in 12 dimensions; symmetric noise on what is trained and chosen by.

    Args:
        seed: of the centres, the rows and the noise.
        noise: share of wrong labels in training and validation, in [0, 1).
        train: rows.
        validation: rows.
        test: rows, whose labels are right.
    """
    rng = np.random.default_rng([seed, 1])
    centres = rng.normal(size=(CLASSES, 2, 12)) * 1.2

    def drawn(count: int) -> tuple[Tensor, np.ndarray]:
        labels = rng.integers(0, CLASSES, count)
        points = centres[labels, rng.integers(0, 2, count)] + rng.normal(size=(count, 12))
        return torch.tensor(points, dtype=torch.float32), labels

    return _splits(drawn, rng, noise, (train, validation, test))


def bags(seed: int, *, noise: float, train: int = 1000, validation: int = 500, test: int = 4000) -> Splits:
    """Word numbers (N, 12) of 160 words, three in ten from twelve of the class's own; else as `clusters`."""
    rng = np.random.default_rng([seed, 2])
    own = rng.permutation(160)[: 12 * CLASSES].reshape(CLASSES, 12)

    def drawn(count: int) -> tuple[Tensor, np.ndarray]:
        labels = rng.integers(0, CLASSES, count)
        chosen = own[labels[:, None], rng.integers(0, 12, (count, 12))]
        words = np.where(rng.random((count, 12)) < 0.3, chosen, rng.integers(0, 160, (count, 12)))
        return torch.tensor(words), labels

    return _splits(drawn, rng, noise, (train, validation, test))


def _splits(
    drawn: Callable[[int], tuple[Tensor, np.ndarray]], rng: np.random.Generator, noise: float, counts: tuple[int, ...]
) -> Splits:
    if not 0 <= noise < 1:
        raise ConfigError(f"`noise` must be in [0, 1), got {noise!r}. It is the share of wrong labels.")
    parts = []
    for count, rate in zip(counts, (noise, noise, 0.0), strict=True):
        features, true = drawn(count)
        given = np.where(rng.random(count) < rate, (true + rng.integers(1, CLASSES, count)) % CLASSES, true)
        parts.append(Rows(features, torch.tensor(given), torch.tensor(true)))
    return Splits(*parts)


class SmallNet(nn.Module):
    """Blocks of a linear layer, a normalisation and a ReLU, and a linear head: scopes "head" and "last:K" fit."""

    base_model_prefix = "base"

    def __init__(self, norm: str = "layer", *, inputs: int = 12, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        widths = [inputs, *(width for _ in range(depth))]
        blocks = [
            nn.Sequential(nn.Linear(before, after), NORMS[norm](after), nn.ReLU()) for before, after in pairwise(widths)
        ]
        self.base = nn.Module()
        self.base.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits (N, CLASSES) of features (N, inputs)."""
        for block in self.base.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            features = block(features)
        return {"logits": self.classifier(features)}


class SmallTransformer(nn.Module):
    """Embeddings of words, one encoder layer of width 32 without dropout, the mean over words, a linear head."""

    def __init__(self, *, words: int = 160, width: int = 32, depth: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        layers = [
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(layers)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits (N, CLASSES) of word numbers (N, words)."""
        hidden = self.embedding(features)
        for block in self.blocks:
            hidden = block(hidden)
        return {"logits": self.classifier(hidden.mean(dim=1))}


@dataclass(frozen=True)
class Training:
    """How a run trains.

    Attributes:
        optimizer: "sgd", "momentum" (0.9) or "adamw".
        rate: η, constant.
        batch: B, rows a step.
        steps: in all.
        every: steps between evaluations.
        observe_from: the step from which evaluations are taken in; an anchor cannot be older.
    """

    optimizer: str = "sgd"
    rate: float = 0.1
    batch: int = 16
    steps: int = 2500
    every: int = 25
    observe_from: int = 0

    def of(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model.

        Raises:
            ConfigError: another name.
        """
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=self.rate)
        if self.optimizer in ("sgd", "momentum"):
            return torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9 * (self.optimizer == "momentum"))
        raise ConfigError(f'`optimizer` must be "sgd", "momentum" or "adamw", got {self.optimizer!r}.')

    def langevin(self, gradient: Any, variance: Any) -> langevin.Langevin:
        """Drift and diffusion a step, of the mean gradient and a row's variance, (coordinates,) each."""
        form = {"sgd": langevin.sgd, "momentum": langevin.momentum, "adamw": langevin.adaptive}[self.optimizer]
        return form(gradient, variance, self.rate, self.batch)


def batches(rows: int, batch: int, seed: int) -> Callable[[], Tensor]:
    """Row numbers (B,) of one batch after another, drawn independently."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randint(rows, (batch,), generator=generator)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, chosen: Tensor) -> None:
    """One optimizer step on the given labels of the chosen rows."""
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(rows.features[chosen])["logits"], rows.given[chosen]).backward()
    optimizer.step()


def noisy_loss(model: nn.Module, rows: Rows) -> float:
    """Cross-entropy on the given labels."""
    with evaluation_mode(model):
        return float(F.cross_entropy(model(rows.features)["logits"], rows.given))


def predictions(model: nn.Module, rows: Rows) -> Tensor:
    """Class numbers (N,)."""
    with evaluation_mode(model):
        return model(rows.features)["logits"].argmax(dim=-1)


def accuracy(model: nn.Module, rows: Rows) -> float:
    """Share of the rows whose true label the model predicts."""
    return float((predictions(model, rows) == rows.true).float().mean())


def memorised(model: nn.Module, rows: Rows) -> float | None:
    """Share of the wrongly labelled rows whose given label the model predicts; None where there are none."""
    wrong = rows.is_wrong
    return float((predictions(model, rows) == rows.given)[wrong].float().mean()) if wrong.any() else None


def run(
    model: nn.Module,
    splits: Splits,
    training: Training,
    config: ResetConfig,
    seed: int,
    watch: Callable[[nn.Module, int], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train, choose on noisy validation, and read the clean test once at the end, by the best and the last weights.

    Args:
        model: fresh.
        splits: its rows.
        training: how.
        config: when to reset, and to what; probability 0 for plain training.
        seed: of batches and resets.
        watch: called with the model (in evaluation, its gradients to be left alone) and the step at each evaluation;
            what it returns is one more point of each named curve.

    Returns:
        `best`, `last` (clean test accuracy), `memorised_best`, `memorised_last`, `best_step`, `armed_step`, `resets`,
        `reset_steps`, `moves` (anchor moves after resets began), `peclet_at_arming` and `history`.
    """
    optimizer, draw = training.of(model), batches(len(splits.train.given), training.batch, seed)
    anchor = AnchorStore(model, optimizer, config.scope, config.optimizer_state)
    best, state, lowest = AnchorStore(model), ResetState(), math.inf
    record: dict[str, Any] = {"reset_steps": [], "moves": 0}
    distances: list[float] = []  # of the anchor's moves before resets begin
    history: dict[str, list[list[float]]] = {}
    for step in range(training.steps + 1):
        if step % training.every == 0 and step >= training.observe_from:
            loss, was_armed = noisy_loss(model, splits.validation), state.armed
            seen = {"validation_loss": loss, "memorised": memorised(model, splits.train)}
            for name, value in {**seen, **(watch(model, step) if watch else {})}.items():
                history.setdefault(name, []).append([step, value])
            if loss < lowest:
                lowest, record["best_step"] = loss, step
                best.snapshot()
            state, moved = observe(config, state, loss, step, greater_is_better=False)
            if moved:
                distances += [anchor.distance()] if anchor.is_set and not state.armed else []
                record["moves"] += was_armed
                anchor.snapshot()
            if state.armed and not was_armed:
                record |= at_arming(model, anchor, splits.train, training, distances)
        if step == training.steps:
            break
        take_step(model, optimizer, splits.train, draw())
        if decide(config, state, step, seed=seed):
            anchor.restore()
            state = state.after_reset(step)
            record["reset_steps"].append(step)
    record |= {"armed_step": state.armed_step, "resets": state.resets, "history": history}
    record |= {"last": accuracy(model, splits.test), "memorised_last": memorised(model, splits.train)}
    with best.swapped():
        record |= {"best": accuracy(model, splits.test), "memorised_best": memorised(model, splits.train)}
    return record


def at_arming(
    model: nn.Module, anchor: AnchorStore, rows: Rows, training: Training, distances: list[float]
) -> dict[str, float | None]:
    """The effective Péclet number at the anchor, when resets begin.

    Towards what the true labels ask: along û, minus the gradient of the correctly labelled rows, with the drift v of
    all rows under this optimizer and the diffusion D of their steps along û, correlations among coordinates and all;
    L is the mean distance of the anchor's moves so far.
    """
    if not distances:
        return {"peclet_at_arming": None}
    with anchor.swapped():
        each, correct = row_gradients(model, rows)
    direction = -each[correct].mean(axis=0)
    unit, variance = direction / np.linalg.norm(direction), each.var(axis=0)
    walk = training.langevin(each.mean(axis=0), variance)
    # What a unit of gradient moves a coordinate by: η, or what momentum or Adam make of it.
    scale = np.sqrt(2 * training.batch * walk.diffusion / np.where(variance > 0, variance, 1.0))
    diffusion = float((each @ (scale * unit)).var()) / (2 * training.batch)
    return {"peclet_at_arming": float(np.mean(distances)) * float(unit @ walk.drift) / (2 * diffusion)}


def row_gradients(model: nn.Module, rows: Rows, sample: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (N, coordinates) of the first rows' losses on their given labels, and where these are right (N,)."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], features: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (weights, buffers), (features[None],))["logits"]
        return F.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    with evaluation_mode(model), torch.enable_grad():
        found = each(weights, rows.features[:sample], rows.given[:sample])
    flat = torch.cat([part.reshape(len(part), -1) for part in found.values()], dim=1)
    return flat.numpy(), ~rows.is_wrong[:sample].numpy()


def parts_of_risk(model: nn.Module, rows: Rows, start: Mapping[str, Tensor]) -> GradientParts:
    """Correct and wrong part of the training risk's gradient, and their push along the path from `start`."""
    found = []
    for wrong in (False, True):
        chosen = rows.is_wrong == wrong
        part = ({"features": rows.features[chosen]}, rows.given[chosen])
        found.append(risk_gradient(model, [part], len(rows.given))[0])
    path = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    return gradient_parts(found[0], found[1], path, {})["all"]
