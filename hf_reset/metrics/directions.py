"""Is a greater value of a metric better? By its name, for the names that people use."""

from __future__ import annotations

import re

_LOWER = frozenset(
    """loss losses error errors err mistake mistakes perplexity ppl bpc bpb nll crossentropy wer cer ter mer
    der eer mse rmse nrmse msle rmsle mae mape smape mase medae ece mce brier deviance distance divergence kl
    kld fid kid fpr fnr far frr hamming regret risk cost""".split()
)
_HIGHER = frozenset(
    """accuracy accuracies acc f1 fbeta fscore precision recall sensitivity specificity tpr tnr auc auroc auprc
    roc ap map mrr ndcg bleu sacrebleu chrf rouge rougel rougelsum meteor bertscore bleurt comet matthews mcc
    pearson pearsonr spearman spearmanr kendall r2 kappa jaccard iou miou dice correlation agreement reward win
    wins success em likelihood psnr ssim""".split()
)
_LEAST = frozenset(["score"])  # says that higher is better where no other word says anything

# Whole names whose words would mislead.
_WHOLE = {
    "word_information_preserved": True,
    "exact_match": True,
    "log_likelihood": True,
    "brier_score": False,
    "error_rate": False,
    "cross_entropy": False,
}


def greater_is_better(name: str) -> bool | None:
    """Whether a greater value of the metric is better.

    Args:
        name: of a metric, such as "eval_error_rate", "f1_macro" or "eval_news_loss"; a prefix makes no difference.

    Returns:
        None where the name does not say, or contradicts itself.
    """
    plain = name.removeprefix("eval_").lower()
    if plain.endswith("loss"):
        return False  # whatever else it says, as Trainer has it
    if plain in _WHOLE:
        return _WHOLE[plain]
    words = [word for word in re.split(r"[^a-z0-9]+", plain) if word]
    if not words or words[0] in ("neg", "negative"):
        return None  # a library's convention, and not everybody's
    found = {direction for word in words if (direction := _of_word(word)) is not None}
    if not found and _LEAST & set(words):
        return True
    return found.pop() if len(found) == 1 else None


def _of_word(word: str) -> bool | None:
    for form in (word, word.rstrip("0123456789")):  # "r2" and "f1" first, then "rouge2" and "ndcg10"
        if form in _HIGHER:
            return True
        if form in _LOWER:
            return False
    return None
