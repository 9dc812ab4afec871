"""The direction of a metric by its name: right, or not told."""

import pytest

from hf_reset.metrics.directions import greater_is_better

LOWER = """loss eval_loss news_loss error_rate eval_error top_5_error perplexity ppl wer cer mse rmse mae RMSE
    mean_absolute_error ece brier_score calibrated_loss accuracy_loss nll eval_test_wer
    word_error_rate mean_squared_error""".split()
HIGHER = """f1 eval_f1 f1_macro micro-f1 accuracy eval_accuracy top_1_accuracy accuracy@5 acc auc
    roc_auc precision recall bleu rouge1 rougeL rougeLsum ndcg10 map50 r2 matthews_correlation exact_match spearmanr
    score f1_score win_rate mean_token_accuracy eval/accuracy log_likelihood""".split()
UNCLEAR = """quality neg_mean_squared_error neg_log_likelihood runtime samples_per_second entropy num_tokens
    accuracy_error positive 17""".split()


@pytest.mark.parametrize(
    ("names", "direction"), [(LOWER, False), (HIGHER, True), (UNCLEAR, None)], ids=["lower", "higher", "unclear"]
)
def test_names_that_people_use(names, direction):
    assert {name: greater_is_better(name) for name in names} == dict.fromkeys(names, direction)
