"""Validation rows of language models: each response's loss at an evaluation, for resets to begin on evidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from hf_reset.anchor.ranks import gathered
from hf_reset.losses.by_name import logits_of
from hf_reset.losses.reduce import scored_rows
from hf_reset.losses.robust import cross_entropy_rows
from hf_reset.metrics.calibrated import CalibratedLoss
from hf_reset.rows.identity import Batch
from hf_reset.training.evidence import LossRows
from hf_reset.training.refining import RefiningMixin


class ResponseRows:
    """What an evaluation of a causal language model leaves behind: a `RowSource`, fed batch by batch.

    A row's loss is the sum over its tokens, in units of the mean number of tokens a row: so the mean over the rows is
    the evaluation's loss a token, and each row's difference is its share of that loss's. 16 bytes a row.

    Attributes:
        latest: None; it is classes that have a calibrated loss.
    """

    latest: CalibratedLoss | None = None

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, Tensor]] = []  # row numbers (B,), and (B, 2): loss and tokens

    def clear(self) -> None:
        """Another evaluation begins."""
        self._found.clear()

    @torch.no_grad()
    def add(self, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            rows: (B,), which rows of the evaluation set it is.
            logits: (B, T, V), unshifted.
            labels: (B, T), −100 where a token is not scored.
        """
        values = [_loss_and_tokens(logits[i : i + 1], labels[i : i + 1]) for i in range(len(rows))]
        self._found.append((rows, torch.stack(values)))

    def take_rows(self) -> LossRows | None:
        """Losses of all processes' rows, (N,), NaN where nothing is scored; what knows nothing has none: NaN, (N,).

        None where there was no evaluation since the last call. With several processes, a collective.
        """
        found, self._found = self._found, []
        shares = gathered([(rows.cpu(), values.cpu()) for rows, values in found])
        batches = [batch for share in shares for batch in share]
        if not batches:
            return None
        rows, values = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
        losses, tokens = np.full((2, int(rows.max()) + 1), np.nan, dtype=np.float64)
        losses[rows], tokens[rows] = values[:, 0], values[:, 1]  # a row that pads a last batch is there twice, alike
        known = tokens > 0
        unit = tokens[known].mean() if known.any() else np.nan
        return np.where(known, losses, np.nan) / unit, np.full(len(losses), np.nan)


class ResponseRowsMixin(RefiningMixin):
    """Has evaluations feed `response_rows`, in front of any Trainer, where it is set.

    Each batch's own logits are used, a row at a time; there is no forward more.

    Attributes:
        response_rows: where the rows go; None where nothing asks for them.
    """

    response_rows: ResponseRows | None = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's."""
        if self.response_rows is not None:
            self.response_rows.clear()  # of a prediction, which nobody asks for its rows
        return super().evaluation_loop(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """As Trainer's; what an evaluation's forward said of each response is kept."""
        labels = inputs.get("labels")
        if self.response_rows is None or self.batch_rows is None or model.training or not isinstance(labels, Tensor):
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        found: Any = super().compute_loss(model, inputs, True, *args, **kwargs)
        loss, outputs = found
        logits = logits_of(outputs)
        if isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape:  # a fused loss may leave none
            self.response_rows.add(self.batch_rows, logits, labels)
        return (loss, outputs) if return_outputs else loss


def _loss_and_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Of one row, (1, T, V) and (1, T): the sum of its tokens' losses, and their number, (2,), float32."""
    scored = scored_rows(logits, labels, shift=True)
    chosen = scored.taking_part
    losses = cross_entropy_rows(scored.logits[chosen], scored.labels[chosen])
    return torch.stack([losses.float().sum(), chosen.sum().float()])
