"""Losses that resist wrong labels, for class logits (N, C) and for tokens (B, T, V).

Each loss here is a function of one number an example or token: log p_y, the log-probability of the given
label. ``label_log_probability`` computes it, and its gradient, a chunk of rows at a time, so that no
(tokens × vocabulary) tensor in float32 is ever held: the forward pass keeps two numbers a row, the backward
pass makes the gradient of the logits, in the logits' own type, and nothing else of that size.

A loss by name for ``Trainer`` is ``compute_loss_func(name, ...)``. To add a loss, write the pure function and
add a line to ``LOSSES``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_reset.errors import ConfigError

# Elements of the working float32 chunk: 16 MiB, whatever the vocabulary and the batch.
_CHUNK_ELEMENTS = 1 << 22


class _LabelLogProbability(torch.autograd.Function):
    """log softmax(logits)[y] a row, in chunks; saves the logits themselves and the normaliser of each row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        dtype = _working_dtype(logits)
        # Maximum and remainder of the normaliser stay apart: their sum would lose digits at large logits.
        top = logits.amax(dim=1).to(dtype)
        rest = torch.empty_like(top)
        for rows in _row_chunks(logits):
            rest[rows] = (logits[rows].to(dtype) - top[rows, None]).exp_().sum(dim=1).log_()
        ctx.save_for_backward(logits, labels, top, rest)
        return logits.gather(1, labels[:, None])[:, 0].to(dtype) - top - rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        logits, labels, top, rest = ctx.saved_tensors
        outer = gradients[0][:, None]
        result = torch.empty_like(logits)
        for rows in _row_chunks(logits):  # d log p_y / d z = onehot(y) - softmax(z)
            chunk = logits[rows].to(top.dtype, copy=True)
            chunk.sub_(top[rows, None]).sub_(rest[rows, None]).exp_().mul_(-outer[rows])
            chunk.scatter_add_(1, labels[rows, None], outer[rows])
            result[rows] = chunk.to(logits.dtype)
        return result, None


def label_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability that the softmax of each row of ``logits`` gives to that row's label.

    Args:
        logits: (N, C), any floating type; float16 and bfloat16 are worked out in float32, chunk by chunk.
        labels: (N,), integers in [0, C).

    Returns:
        (N,), in nats, at most 0; float32, or float64 for float64 logits. Differentiable once.
    """
    return _LabelLogProbability.apply(logits, labels)  # type: ignore[no-any-return]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items_in_batch: Tensor | float | None = None,
    shift: bool | None = None,
) -> Tensor:
    """Cross-entropy, −log p_y: what the model's own loss computes, in this module's memory-lean form.

    See ``generalized_cross_entropy`` for the shapes and the common arguments.
    """
    log_p, weight = _given_labels(logits, labels, ignore_index, shift)
    return _reduce(-log_p, weight, num_items_in_batch)


def generalized_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    q: float = 0.7,
    ignore_index: int = -100,
    num_items_in_batch: Tensor | float | None = None,
    shift: bool | None = None,
) -> Tensor:
    """Generalised cross-entropy, (1 − p_y^q) / q.

    Between cross-entropy (the limit q → 0) and half the mean absolute error (q = 1, 1 − p_y). The gradient is
    that of cross-entropy weighted by p_y^q, so labels that the model finds unlikely pull less.

    Args:
        logits: (N, C), one row an example; or (B, T, V), one row a token.
        labels: (N,) or (B, T), integers; positions equal to ``ignore_index`` take no part.
        q: in [0, 1]; 0 is cross-entropy itself. The paper uses 0.7.
        ignore_index: label of the positions left out.
        num_items_in_batch: divide the sum by this count instead of by the number of positions that take part:
            the labels of all micro-batches (and ranks) of one optimizer step, as ``Trainer`` passes it.
        shift: whether the row at position t is scored against the label at t + 1, as in causal language
            modelling, where model and ``Trainer`` carry labels unshifted. None: yes for (B, T, V), no for
            (N, C). Give False for token classification, masked language modelling or labels already shifted.

    Returns:
        Scalar, float32 (float64 for float64 logits). 0 where no position takes part.

    Raises:
        ConfigError: ``q`` outside [0, 1], or shapes that do not fit together.

    References:
        Zhilu Zhang, Mert Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with
        Noisy Labels", NeurIPS 2018, eq. 6, https://arxiv.org/abs/1805.07836.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([0, -100])
        >>> round(float(generalized_cross_entropy(logits, labels, q=1.0)), 6)
        0.5
    """
    if not 0.0 <= q <= 1.0:
        raise ConfigError(f"`q` must be in [0, 1], got {q}. 0 is cross-entropy, 1 is 1 - p_y.")
    log_p, weight = _given_labels(logits, labels, ignore_index, shift)
    loss = -log_p if q == 0.0 else -torch.expm1(q * log_p) / q  # expm1: no cancellation as q → 0
    return _reduce(loss, weight, num_items_in_batch)


def symmetric_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = -4.0,
    ignore_index: int = -100,
    num_items_in_batch: Tensor | float | None = None,
    shift: bool | None = None,
) -> Tensor:
    """Symmetric cross-entropy, α · CE + β · RCE, with the reverse cross-entropy RCE = −A (1 − p_y).

    RCE is −Σ_k p_k log t_k of the one-hot label t, with log 0 := A. With β = 0 it is α times cross-entropy,
    with α = 0 a multiple of the mean absolute error.

    Args:
        logits: (N, C) or (B, T, V), as in ``generalized_cross_entropy``.
        labels: (N,) or (B, T).
        alpha: α ≥ 0, weight of cross-entropy.
        beta: β ≥ 0, weight of reverse cross-entropy.
        log_zero: A < 0, what log 0 is taken to be; the paper's −4.
        ignore_index: see ``generalized_cross_entropy``.
        num_items_in_batch: see ``generalized_cross_entropy``.
        shift: see ``generalized_cross_entropy``.

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        ConfigError: a weight below 0, both 0, ``log_zero`` not below 0, or shapes that do not fit together.

    References:
        Yisen Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV
        2019, section 3, https://arxiv.org/abs/1908.06112.
    """
    if not (alpha >= 0.0 and beta >= 0.0 and 0.0 < alpha + beta < math.inf):
        raise ConfigError(
            f"`alpha` and `beta` must be finite, at least 0 and not both 0, got alpha={alpha}, beta={beta}."
        )
    if not -math.inf < log_zero < 0.0:
        raise ConfigError(f"`log_zero` stands for log 0: it must be below 0, got {log_zero}. The paper uses -4.")
    log_p, weight = _given_labels(logits, labels, ignore_index, shift)
    return _reduce(-alpha * log_p + beta * log_zero * torch.expm1(log_p), weight, num_items_in_batch)


# Where a further loss gets its name. Each takes (logits, labels, *, ignore_index, num_items_in_batch, shift)
# and keywords of its own.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "generalized_cross_entropy": generalized_cross_entropy,
    "gce": generalized_cross_entropy,
    "symmetric_cross_entropy": symmetric_cross_entropy,
    "sce": symmetric_cross_entropy,
}


def compute_loss_func(name: str, *, shift: bool | None = None, **options: float) -> Callable[..., Tensor]:
    """The loss called ``name`` as ``Trainer``'s ``compute_loss_func(outputs, labels, num_items_in_batch)``.

    ``Trainer(..., compute_loss_func=compute_loss_func("gce", q=0.7))`` uses it in training and in evaluation,
    so that ``eval_loss`` is this loss too. A trainer subclass sets ``self.compute_loss_func`` after
    ``super().__init__``, which also suits TRL's SFTTrainer, whose constructor argument is deprecated; it then
    passes ``shift=shifts_labels(model)``, because the logits' shape alone does not tell token classification
    from causal language modelling.

    Args:
        name: a key of ``LOSSES``.
        shift: see ``generalized_cross_entropy``.
        options: the loss's own keywords, such as ``q`` or ``alpha`` and ``beta``.

    Raises:
        ConfigError: an unknown name, or an option that this loss does not take or cannot have.
    """
    if name not in LOSSES:
        raise ConfigError(f"`loss` must be one of {', '.join(LOSSES)}, got {name!r}.")
    loss = LOSSES[name]
    known = set(inspect.signature(loss).parameters) - {"logits", "labels", "num_items_in_batch", "shift"}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"loss {name!r} takes no {', '.join(unknown)}; it takes {', '.join(sorted(known))}.")
    loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), **options)  # refuses bad values before training

    def compute(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        if labels is None:
            raise ConfigError(f"loss {name!r} needs `labels` in every batch, and this one has none.")
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return loss(logits, labels, num_items_in_batch=num_items_in_batch, shift=shift, **options)

    return compute


def shifts_labels(model: torch.nn.Module) -> bool:
    """Whether ``model`` is a causal language model, whose labels are to be shifted by the loss.

    Looks through PEFT and other wrappers at the class that transformers registers for causal modelling.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(base.__name__ in causal for module in model.modules() for base in type(module).__mro__)


def _given_labels(logits: Tensor, labels: Tensor, ignore_index: int, shift: bool | None) -> tuple[Tensor, Tensor]:
    """Log-probability of each given label, and whether it takes part: two vectors of one entry a row."""
    if logits.ndim not in (2, 3) or logits.shape[:-1] != labels.shape:
        raise ConfigError(
            f"`logits` must be (N, C) with `labels` (N,), or (B, T, V) with (B, T); got "
            f"{tuple(logits.shape)} with {tuple(labels.shape)}."
        )
    if shift is None:
        shift = logits.ndim == 3
    labels = labels.to(logits.device)
    if shift:
        if logits.ndim != 3:
            raise ConfigError(
                "`shift` moves labels along a sequence and needs logits (B, T, V), got (N, C). "
                "Leave it out for class logits."
            )
        # The labels move, not the logits: a slice of the logits would have to be copied.
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    labels = labels.reshape(-1)
    taking_part = labels != ignore_index
    # A row left out still needs a label that exists; its weight 0 removes value and gradient alike.
    safe = torch.where(taking_part, labels, 0)
    return label_log_probability(logits.reshape(-1, logits.shape[-1]), safe), taking_part


def _reduce(loss: Tensor, taking_part: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    """Sum over the positions that take part, divided as transformers' ``fixed_cross_entropy`` divides."""
    total = torch.where(taking_part, loss, 0.0).sum()
    if num_items_in_batch is None:
        return total / taking_part.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return total / num_items_in_batch


def _working_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_chunks(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]
