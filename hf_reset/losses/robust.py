"""Losses that resist wrong labels, as pure functions of logits (N, C) and labels (N,): one value a row.

What to leave out, shifting, and dividing are not here but in `reduce`, once for all losses. Most of these are
functions of one number a row: log p_y, the log-probability of the given label. `label_log_probability` computes
it, and its gradient, a chunk of rows at a time, so that no (tokens × vocabulary) tensor in float32 is ever held:
the forward pass keeps two numbers a row, the backward pass makes the gradient of the logits, in the logits' own
type, and nothing else of that size. The others go through `in_chunks`, to the same end.
"""

from __future__ import annotations

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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
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
    """Log-probability that the softmax of each row of `logits` gives to that row's label.

    Args:
        logits: (N, C), any floating type; float16 and bfloat16 are worked out in float32, chunk by chunk.
        labels: (N,), integers in [0, C).

    Returns:
        (N,), in nats, at most 0; float32, or float64 for float64 logits. Differentiable once.
    """
    return _LabelLogProbability.apply(logits, labels)


class _InChunks(torch.autograd.Function):
    """A function of rows, a chunk in float32 at a time; the backward pass works each chunk out again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.function = function
        dtype = _working_dtype(logits)
        return torch.cat([function(logits[rows].to(dtype), labels[rows]) for rows in _row_chunks(logits)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, labels = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            with torch.enable_grad():
                chunk = logits[rows].detach().to(_working_dtype(logits)).requires_grad_()
                (of_chunk,) = torch.autograd.grad(ctx.function(chunk, labels[rows]), chunk, gradients[0][rows])
            result[rows] = of_chunk.to(logits.dtype)
        return result, None, None


def in_chunks(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """`function(logits, labels)` → (N,) without holding more than a few rows in float32, at the cost of doing it twice.

    Args:
        function: differentiable, from (n, C) and (n,) or (n, C) to (n,), each row by itself.
        logits: (N, C), any floating type.
        labels: (N,), or targets (N, C).

    Returns:
        (N,), float32, or float64 for float64 logits. Differentiable once, in `logits` only.
    """
    return _InChunks.apply(logits, labels, function)  # pyright: ignore[reportReturnType]


def cross_entropy_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, −log p_y: what the model's own loss computes, in this module's memory-lean form.

    Args:
        logits: (N, C).
        labels: (N,), integers in [0, C).

    Returns:
        (N,), in nats.
    """
    return -label_log_probability(logits, labels)


def generalized_cross_entropy_rows(logits: Tensor, labels: Tensor, *, q: float | None = None) -> Tensor:
    """Generalised cross-entropy, (1 − p_y^q) / q.

    Between cross-entropy (the limit q → 0) and half the mean absolute error (q = 1, 1 − p_y). The gradient is
    that of cross-entropy weighted by p_y^q, so labels that the model finds unlikely pull less.

    Args:
        logits: (N, C).
        labels: (N,), integers in [0, C).
        q: in [0, 1]; 0 is cross-entropy itself. None: the paper's 0.7 for up to ten classes, and 0.7 ln 10 / ln C for
            more. With ten (its CIFAR-10) a label begins with the weight 10^-0.7 = 0.2, and with this q it does so
            whatever C is; with 0.7 and 77 classes that is 0.05, and the model learns too slowly to tell right from
            wrong labels. For a language model C is the vocabulary: give a `q` of your own.

    Returns:
        (N,), in [0, 1 / q].

    Raises:
        ConfigError: `q` outside [0, 1].

    References:
        Zhilu Zhang, Mert Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with
        Noisy Labels", NeurIPS 2018, eq. 6, https://arxiv.org/abs/1805.07836.

    Example:
        >>> import torch
        >>> rows = generalized_cross_entropy_rows(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), q=1.0)
        >>> [round(float(row), 6) for row in rows]
        [0.5]
    """
    if q is None:
        q = 0.7 * min(1.0, math.log(10) / math.log(max(2, logits.shape[-1])))
    if not 0.0 <= q <= 1.0:
        raise ConfigError(f"`q` must be in [0, 1], got {q}. 0 is cross-entropy, 1 is 1 - p_y.")
    log_p = label_log_probability(logits, labels)
    return -log_p if q == 0.0 else -torch.expm1(q * log_p) / q  # expm1: no cancellation as q → 0


def symmetric_cross_entropy_rows(
    logits: Tensor, labels: Tensor, *, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0
) -> Tensor:
    """Symmetric cross-entropy, α · CE + β · RCE, with the reverse cross-entropy RCE = −A (1 − p_y).

    RCE is −Σ_k p_k log t_k of the one-hot label t, with log 0 := A. With β = 0 it is α times cross-entropy,
    with α = 0 a multiple of the mean absolute error.

    Args:
        logits: (N, C).
        labels: (N,), integers in [0, C).
        alpha: α ≥ 0, weight of cross-entropy.
        beta: β ≥ 0, weight of reverse cross-entropy.
        log_zero: A < 0, what log 0 is taken to be; the paper's −4.

    Returns:
        (N,).

    Raises:
        ConfigError: a weight below 0, both 0, or `log_zero` not below 0.

    References:
        Yisen Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV
        2019, section 3, https://arxiv.org/abs/1908.06112.
    """
    _check_weights(alpha, beta, log_zero)
    log_p = label_log_probability(logits, labels)
    return -alpha * log_p + beta * log_zero * torch.expm1(log_p)


def active_passive_rows(
    logits: Tensor, labels: Tensor, *, alpha: float = 1.0, beta: float = 1.0, log_zero: float = -4.0
) -> Tensor:
    """Active-passive loss α · NCE + β · RCE, with the normalised cross-entropy NCE = log p_y / Σ_k log p_k.

    NCE ("active": raises p_y) lies in [0, 1] and its sum over all labels is constant, which makes it robust to
    symmetric noise but slow to fit; RCE ("passive": lowers the others), of `symmetric_cross_entropy_rows`,
    makes up for that.

    Args:
        logits: (N, C).
        labels: (N,), integers in [0, C).
        alpha: α ≥ 0, weight of NCE. The paper uses 1 for 10 classes and 10 for 100.
        beta: β ≥ 0, weight of RCE. The paper uses 1 for 10 classes and 0.1 for 100.
        log_zero: A < 0, what log 0 is taken to be; −4.

    Returns:
        (N,), in [0, α − A β].

    Raises:
        ConfigError: a weight below 0, both 0, or `log_zero` not below 0.

    References:
        Xingjun Ma et al., "Normalized Loss Functions for Deep Learning with Noisy Labels", ICML 2020,
        eq. 4 and 12, https://arxiv.org/abs/2006.13554.
    """
    _check_weights(alpha, beta, log_zero)

    def rows(logits: Tensor, labels: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1)
        given = log_p.gather(1, labels[:, None])[:, 0]
        # Below 0 but for a single class, which has nothing to normalise.
        return alpha * given / log_p.sum(dim=1).clamp(max=-1e-30) + beta * log_zero * torch.expm1(given)

    return in_chunks(rows, logits, labels)


def soft_bootstrapping_rows(logits: Tensor, labels: Tensor, *, beta: float = 0.95) -> Tensor:
    """Soft bootstrapping, −Σ_k [β t_k + (1 − β) p_k] log p_k of the one-hot label t.

    Cross-entropy weighted by β plus the entropy of the prediction weighted by 1 − β: predictions are drawn
    towards what the model already believes. The gradient goes through both p, as in the paper.

    Args:
        logits: (N, C).
        labels: (N,), integers in [0, C).
        beta: β in [0, 1], the share of the given label; 1 is cross-entropy. The paper uses 0.95.

    Returns:
        (N,), in nats.

    Raises:
        ConfigError: `beta` outside [0, 1].

    References:
        Scott Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping", 2014,
        eq. 6, https://arxiv.org/abs/1412.6596.
    """
    return _bootstrapped(logits, labels, beta, lambda log_p: (log_p.exp() * log_p).sum(dim=1))


def hard_bootstrapping_rows(logits: Tensor, labels: Tensor, *, beta: float = 0.8) -> Tensor:
    """Hard bootstrapping, −β log p_y − (1 − β) log p_z with z the class that the model predicts.

    Args:
        logits: (N, C).
        labels: (N,), integers in [0, C).
        beta: β in [0, 1], the share of the given label; 1 is cross-entropy. The paper uses 0.8.

    Returns:
        (N,), in nats.

    Raises:
        ConfigError: `beta` outside [0, 1].

    References:
        Scott Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping", 2014,
        eq. 7, https://arxiv.org/abs/1412.6596.
    """
    return _bootstrapped(logits, labels, beta, lambda log_p: log_p.amax(dim=1))


def _bootstrapped(logits: Tensor, labels: Tensor, beta: float, own: Callable[[Tensor], Tensor]) -> Tensor:
    """−β log p_y − (1 − β) times what the prediction says of itself, `own` of its log-probabilities (n, C)."""
    _check_share(beta)

    def rows(logits: Tensor, labels: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1)
        return -beta * log_p.gather(1, labels[:, None])[:, 0] - (1.0 - beta) * own(log_p)

    return in_chunks(rows, logits, labels)


def soft_target_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against whole distributions, −Σ_k t_k log p_k.

    Args:
        logits: z, (N, C).
        targets: t, (N, C), each row at least 0 with sum 1; no gradient goes to them.

    Returns:
        (N,), in nats.
    """
    return in_chunks(lambda z, t: -(t.to(z.dtype) * z.log_softmax(dim=1)).sum(dim=1), logits, targets)


def expected_rows(rows: Callable[..., Tensor], logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Any loss of rows against whole distributions: its mean over labels drawn from them, Σ_k t_k ℓ(z, k).

    For cross-entropy it is `soft_target_rows`; for the others it works out the loss of every label, (N, C, C)
    numbers.

    Args:
        rows: a loss of rows, (N, C) and (N,) → (N,).
        logits: z, (N, C).
        targets: t, (N, C), each row at least 0 with sum 1; no gradient goes to them.
        options: the loss's own keywords.

    Returns:
        (N,).
    """
    if rows is cross_entropy_rows:
        return soft_target_rows(logits, targets)
    classes = logits.shape[1]
    labels = torch.arange(classes, device=logits.device).repeat(len(logits))
    every = rows(logits.repeat_interleave(classes, dim=0), labels, **options).view(-1, classes)
    return (targets.to(every.dtype) * every).sum(dim=1)


def _check_weights(alpha: float, beta: float, log_zero: float) -> None:
    if not (alpha >= 0.0 and beta >= 0.0 and 0.0 < alpha + beta < math.inf):
        raise ConfigError(
            f"`alpha` and `beta` must be finite, at least 0 and not both 0, got alpha={alpha}, beta={beta}."
        )
    if not -math.inf < log_zero < 0.0:
        raise ConfigError(f"`log_zero` stands for log 0: it must be below 0, got {log_zero}. The paper uses -4.")


def _check_share(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ConfigError(
            f"`beta` must be in [0, 1], got {beta}. It is the share of the given label; 1 is cross-entropy."
        )


def _working_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_chunks(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    return [slice(start, start + step) for start in range(0, max(1, logits.shape[0]), step)]
