"""The card of a saved model: what a hub reads of it, and what it tells people."""

import peft
import pytest
from huggingface_hub import ModelCard
from tiny import bert

from hf_reset.report.classification import write_card
from hf_reset.report.model_card import evaluations, thinned, write_model_card

ASKED = {
    "label_column": "label",
    "validation_label_column": None,
    "clean_label_column": None,
    "noise_rate": 0.4,
    "noise_kind": "symmetric",
    "dataset_name": None,
    "train_file": None,
    "model_name_or_path": "org/small-model",
    "lora_rank": 0,
    "reset_finish": "anchor",
}


def record(accuracy, **more):
    return {
        "test_accuracy_last": accuracy,
        "test_accuracy_best": accuracy - 0.1,
        "test_macro_f1_last": None,
        "can_reset": True,
        "resets": 7,
        "steps": 400,
        "best_step": 130,
        "train_rows": 200,
        "train_mislabelled": 80,
        "suspects_share": 0.35,
        "history": {"validation_loss": [[10 * k, 2.0 - 0.01 * k] for k in range(1, 41)]},
        **more,
    }


def folder_of(tmp_path):
    folder = tmp_path / "reset-seed0" / "model"
    folder.mkdir(parents=True)
    return folder


def test_a_card_of_one_run(tmp_path):
    path = write_card(folder_of(tmp_path), [record(0.75)], ASKED)
    card = ModelCard.load(path)
    results = {result.metric_name: result for result in card.data.eval_results}
    assert [result.metric_value for result in results.values()] == [0.75, 0.65]
    assert card.data.base_model == "org/small-model"
    assert card.data.library_name == "transformers"
    for words in (
        "Standard-library docstrings: 40% symmetric label noise",
        "200, 80 of them (40%) with a label known to be wrong",
        "35% of the training rows",
        "**Resets:** 7",
        "400, the best evaluation at step 130",
        "the anchor's, the best by validation",
        "noisy like the training labels",
        "| 130 | 1.8700 |",
        "Run 'reset-seed0'",
    ):
        assert words in card.text, words


def test_several_seeds_give_a_mean_and_its_deviation(tmp_path):
    folder = folder_of(tmp_path)
    write_card(folder, [record(0.9), record(0.924)], ASKED)
    card = ModelCard.load(folder / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["Clean test accuracy, last step's weights"] == "0.912 ± 0.017"  # 0.024 / sqrt(2)
    assert "over 2 seeds" in card.text


def test_measures_that_are_missing_are_left_out():
    assert evaluations([{"test_accuracy_last": None}], "data") == []
    assert [result.metric_type for result in evaluations([{"test_macro_f1_last": 0.5}], "data")] == ["f1"]


def test_a_path_of_the_machine_that_trained_is_not_told(tmp_path):
    base = tmp_path / "secret" / "base"
    base.mkdir(parents=True)
    card = write_card(folder_of(tmp_path), [record(0.5)], {**ASKED, "model_name_or_path": str(base)}).read_text()
    assert "base_model" not in card
    assert "secret" not in card
    assert "**Fine-tuned from:** base" in card


def test_adapters_keep_loading_beside_their_card(tmp_path):
    """PEFT leaves a card of its own, a form to be filled in: ours takes its place."""
    folder = folder_of(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(bert(), config).save_pretrained(folder)
    assert "More Information Needed" in (folder / "README.md").read_text()
    write_model_card(folder, [record(0.5)], title="data", chosen_by="noisy ones.", adapters=True, saved="last")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert "More Information Needed" not in card.text
    assert "**Weights saved:** the last step's" in card.text
    peft.PeftModel.from_pretrained(bert(), folder)


@pytest.mark.parametrize("points", [0, 1, 12, 13, 500])
def test_a_curve_keeps_its_ends_and_its_best(points):
    curve = [[step, -step] for step in range(1, points + 1)]
    kept = [step for step, _ in thinned(curve, best_step=min(points, 7) or None)]
    assert len(kept) <= 13
    assert kept == sorted(set(kept))
    if points:
        assert {1, points, min(points, 7)} <= set(kept)
    if points <= 12:
        assert len(kept) == points
