"""What a run keeps of each training row, from the forward passes that training makes anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_reset.errors import ConfigError, DataError
from hf_reset.rows.visits import Turn, VisitMemory, check_bound

MAX_BYTES = 1 << 28
"""What a row memory may take without being told otherwise: 256 MiB."""

_BYTES_A_ROW = 76  # without class probabilities

# The columns of one visit; the class probabilities come last.
_LOSS, _GIVEN, _OTHER, _LABEL, _PREDICTED, _CLASSES = range(6)


class RowMemory(VisitMemory):
    """For each row of a classification training set, what was predicted for it before it was learnt from.

    After a reset the model has not memorised, so what it says of a row before that row's own gradient is close to
    an out-of-fold prediction, again at each visit. `update` keeps what a step saw, `share` enters it: call that at
    evaluations and at the end of each epoch, with several processes on all of them together. What can be read is
    what has been entered.

    Held on the CPU: 76 bytes a row, and 4 K more where class probabilities are kept, which is where that
    stays within `max_bytes`; beyond it the given label's probability, the strongest other and the wrong events
    remain. What waits for `share` takes 28 + 4 K bytes a visit (28 without class probabilities).

    Args:
        num_rows: N, rows of the training set.
        num_classes: K, at least 2.
        decay: γ in (0, 1]. At each visit of a row the weight of its earlier ones is multiplied by γ in
            `probabilities` and `margins`; 1 is the plain mean.
        max_bytes: the most that may be held.

    Attributes:
        total: `Tally` of "loss", "margin" and "wrong" over all visits.
        since_reset: the same since the last reset.
        first_visits: the same at the first visit in each excursion, the steps before the first reset among them.
        labels: (N,), int32, as seen; −100 before the first visit.
        last_loss: (N,), of the last visit; NaN before the first.
        last_predicted: (N,), int32, of the last visit; −100 before the first.

    Raises:
        ConfigError: an option out of range, or a memory that would not fit into `max_bytes` in any form.

    References:
        Geoff Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020,
        https://arxiv.org/abs/2001.10528: the mean margin over visits, here of probabilities. Hwanjun Song et al.,
        "Learning from Noisy Labels with Deep Neural Networks: A Survey", https://arxiv.org/abs/2007.08199.

    Example:
        >>> memory = RowMemory(num_rows=3, num_classes=2)
        >>> memory.update(torch.tensor([2]), torch.tensor([[0.0, 2.0]]), torch.tensor([0]))
        >>> memory.share()
        >>> memory.margins
        tensor([    nan,     nan, -0.7616])
    """

    def __init__(self, num_rows: int, num_classes: int, *, decay: float = 1.0, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(num_rows, decay, ("loss", "margin", "wrong"))
        if num_classes < 2:
            raise ConfigError(f"A row memory of classes needs at least 2, got {num_classes}.")
        check_bound(_BYTES_A_ROW * num_rows, max_bytes)
        self.num_classes = num_classes
        self.keeps_probabilities = num_rows * (_BYTES_A_ROW + 4 * num_classes) <= max_bytes
        self.labels = torch.full((num_rows,), -100, dtype=torch.int32)
        self.last_predicted = self.labels.clone()
        self._given, self._other = torch.zeros(num_rows), torch.zeros(num_rows)
        self._classes = torch.zeros(num_rows, num_classes if self.keeps_probabilities else 0)

    @torch.no_grad()
    def update(self, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Keep what one forward pass said, before its own update; no waiting for the device.

        Args:
            rows: (B,), row numbers; a row may come more than once.
            logits: (B, K), any floating type.
            labels: (B,), the labels as given; rows of −100 are left out.

        Raises:
            DataError: shapes that do not fit.
        """
        if logits.shape != (len(rows), self.num_classes) or labels.shape != (len(rows),):
            raise DataError(
                f"A row memory of {self.num_classes} classes needs logits (B, {self.num_classes}) and labels (B,), got "
                f"{tuple(logits.shape)} and {tuple(labels.shape)} for {len(rows)} rows."
            )
        log_p = logits.float().log_softmax(dim=1)
        p, at = log_p.exp(), labels.clamp(min=0)[:, None]
        loss, given = -log_p.gather(1, at)[:, 0], p.gather(1, at)[:, 0]
        other = p.scatter(1, at, -1.0).amax(dim=1)
        # Class numbers are exact in float32 up to 2^24.
        head = torch.stack([loss, given, other, labels.float(), p.argmax(dim=1).float()], dim=1)
        self.log.add(rows, torch.cat([head, p], dim=1) if self.keeps_probabilities else head)

    @property
    def probabilities(self) -> Tensor:
        """Mean class probabilities over the visits, recent ones counting more where `decay` < 1; (N, K), float32.

        NaN in rows not visited.

        Raises:
            ConfigError: `max_bytes` left no room for them.
        """
        if not self.keeps_probabilities:
            raise ConfigError(
                f"Mean probabilities of {self.num_rows} rows and {self.num_classes} classes are not kept: they need "
                f"{self.num_rows * (_BYTES_A_ROW + 4 * self.num_classes)} bytes. Raise `max_bytes`."
            )
        return self._mean(self._classes)

    @property
    def margins(self) -> Tensor:
        """Mean of the given label's probability less the strongest other's, weighed likewise; (N,), in [−1, 1]."""
        return self._mean(self._given - self._other)

    @property
    def wrong_events(self) -> Tensor:
        """Visits at which another class than the given one was predicted, (N,), int32."""
        return self.total.sums["wrong"].int()

    def _enter(self, turn: Turn) -> None:
        labelled = turn.values[:, _LABEL] >= 0
        turn = turn if labelled.all() else Turn(*(part[labelled] for part in turn))
        rows, values = turn.rows, turn.values
        label, predicted = values[:, _LABEL].int(), values[:, _PREDICTED].int()
        self._check_labels(rows, label)
        self.labels[rows], self.last_predicted[rows] = label, predicted
        given, other = values[:, _GIVEN], values[:, _OTHER]
        kept = [(self._given, given), (self._other, other)]
        if self.keeps_probabilities:
            kept.append((self._classes, values[:, _CLASSES:]))
        wrong = (predicted != label).float()
        self._count(turn, {"loss": values[:, _LOSS], "margin": given - other, "wrong": wrong}, kept)

    def _check_labels(self, rows: Tensor, label: Tensor) -> None:
        known = self.labels[rows]
        changed = (known != -100) & (known != label)
        if changed.any():
            row, before, now = (int(part[changed][0]) for part in (rows, known, label))
            raise DataError(
                f"Row {row} had label {before} and now has {now}: row numbers must mean the same row throughout a run, "
                "and labels must be those given, not refined ones."
            )

    def _tensors(self) -> dict[str, Tensor]:
        own = {"labels": self.labels, "last_predicted": self.last_predicted, "classes": self._classes}
        return {**super()._tensors(), **own, "given": self._given, "other": self._other}
