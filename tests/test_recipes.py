"""The text-classification recipe from end to end, on settings so small that a run takes a second or two."""

import csv
import json
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from scripts import load_script

from hf_reset import ResetTrainingArguments
from hf_reset.errors import ConfigError, DataError, MetricError
from hf_reset.report.results import read_results
from hf_reset.study.options import parse_recipe
from hf_reset.training.checkpoints import last_whole_checkpoint

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "text_classification"
SCRIPT = FOLDER / "train.py"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
TOPICS = {"fruit": "apple pear plum grape cherry", "metal": "iron copper zinc silver tin", "bird": "owl crow wren gull"}


recipe = load_script("text_classification/train.py")

# 18 validation rows are few, and it says so.
pytestmark = pytest.mark.filterwarnings("ignore::hf_reset.errors.WeakEvidenceWarning")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three topics that a handful of steps can tell apart; `given` has every fifth label wrong."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for split, count in (("train", 120), ("test", 30)):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "given"])
            for index in range(count):
                topic = list(TOPICS)[index % 3]
                words = " ".join(draw.choices(TOPICS[topic].split(), k=6))
                writer.writerow([f"{words} {index}", topic, list(TOPICS)[(index + (index % 5 == 0)) % 3]])
    return folder


def options(files, output_dir, **more):
    """A command line: tiny data, tiny model, few steps."""
    chosen = {
        "train_file": files / "train.csv",
        "test_file": files / "test.csv",
        "output_dir": output_dir,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 300,
        "max_seq_length": 16,
        "max_steps": 12,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "reset_patience": 0,
        "reset_probability": 0.5,
        "use_cpu": True,
        **more,
    }
    words = []
    for name, value in chosen.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture(scope="module")
def study(files, tmp_path_factory):
    """Both arms of two seeds, at 40 % noise."""
    output_dir = tmp_path_factory.mktemp("study")
    recipe.main(options(files, output_dir, compare=True, seeds=[0, 1], noise_rate=0.4))
    return output_dir


def test_both_arms_and_seeds_are_recorded_with_the_agreed_keys(study):
    results = read_results(study)
    assert [(r["arm"], r["seed"]) for r in results["records"]] == [
        ("plain", 0),
        ("reset", 0),
        ("plain", 1),
        ("reset", 1),
    ]
    for record in results["records"]:
        for key in ("test_accuracy_last", "test_accuracy_best", "label_memory_last"):
            assert 0 <= record[key] <= 1
        assert record["train_seconds"] > 0
        assert record["peak_memory_bytes"] > 2**20
        assert record["resets"] == len(record["reset_steps"])
        assert [step for step, _ in record["history"]["validation_loss"]] == [2, 4, 6, 8, 10, 12]
        assert set(record["history"]) == {
            *("validation_loss", "calibrated_loss", "label_noise"),
            *("validation_accuracy", "clean_accuracy", "label_memory"),
        }
        plain, calibrated = (dict(record["history"][name]) for name in ("validation_loss", "calibrated_loss"))
        assert all(calibrated[step] <= plain[step] + 1e-6 for step in plain)
        assert record["label_noise_best"] == dict(record["history"]["label_noise"])[record["best_step"]]
    assert results["configuration"]["noise_rate"] == 0.4
    assert results["configuration"]["reset_probability"] == 0.5
    assert "torch" in results["environment"]["packages"]


def test_the_saved_models_card_gives_the_mean_over_seeds(study):
    from huggingface_hub import ModelCard

    records = [r for r in read_results(study)["records"] if r["arm"] == "reset"]
    values = [record["test_accuracy_last"] for record in records]
    card = ModelCard.load(study / "reset-seed1" / "model" / "README.md")
    shown = {result.metric_name: result.metric_value for result in card.data.eval_results}
    mean = f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert shown["Clean test accuracy, last step's weights"] == mean
    assert f"**Suspect labels:** {records[1]['suspects_share']:.0%} of the training rows" in card.text
    assert "40% symmetric label noise" in card.text


def test_only_the_reset_arm_resets_and_both_begin_alike(study):
    plain, reset = read_results(study)["records"][:2]
    assert plain["resets"] == 0
    assert reset["resets"] > 0
    assert plain["history"]["validation_loss"][0] == reset["history"]["validation_loss"][0]


def test_the_most_suspect_rows_are_told_with_their_text(study):
    import pandas as pd

    record = read_results(study)["records"][1]
    table = pd.read_csv(study / "reset-seed0" / "suspects.csv", index_col="row")
    assert len(table) == record["train_rows"]
    assert table["label_quality"].dropna().is_monotonic_increasing  # rows that no step met come last
    assert table["is_wrong"].sum() == record["train_mislabelled"]
    worst = record["most_suspect"]
    assert [row["row"] for row in worst] == table.index[:10].tolist()
    assert [row["text"] for row in worst] == table["text"][:10].tolist()
    assert {row["given"] for row in worst} <= {"bird", "fruit", "metal"}
    ranks = table.loc[table["rank"].notna(), ["is_wrong", "label_quality"]]
    wrong, right = (ranks.loc[ranks["is_wrong"] == value, "label_quality"].to_numpy() for value in (True, False))
    pairs = (wrong[:, None] < right).mean() + (wrong[:, None] == right).mean() / 2
    assert record["suspects_auroc"] == pytest.approx(pairs)
    report = (study / "report.md").read_text()
    assert "## Most suspect rows" in report
    assert record["most_suspect"][0]["text"] in report
    assert "of the validation labels look wrong" in report


def test_a_study_that_refines_has_three_arms(files, tmp_path):
    asked = options(files, tmp_path, compare=True, noise_rate=0.4, reset_refine="soft")
    records = recipe.run(asked)["records"]
    assert [record["arm"] for record in records] == ["plain", "reset", "reset + refine"]
    for record in records:  # all chosen alike
        assert record["best_metric"] == min(value for _, value in record["history"]["calibrated_loss"])
    assert (tmp_path / "reset+refine-seed0" / "model" / "config.json").is_file()


def test_the_best_is_the_best_evaluation(study):
    for record in read_results(study)["records"]:
        losses = dict(record["history"]["validation_loss"])
        assert record["best_metric"] == min(losses.values()) == losses[record["best_step"]]


def test_report_and_figure_lie_beside_the_results(study):
    report = (study / "report.md").read_text()
    assert "validation labels noisy like the training labels" in report
    assert "No validation split was given: 18 of 120 training rows were taken for it." in report
    assert "![Curves of the run](curves.png)" in report
    assert (study / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_each_run_leaves_a_model_that_loads(study):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(study / "reset-seed0" / "model")
    assert model.config.label2id == {"bird": 0, "fruit": 1, "metal": 2}
    assert AutoTokenizer.from_pretrained(study / "reset-seed0" / "model").pad_token == "[PAD]"


def test_a_second_run_into_the_same_folder_is_refused(files, study, capsys):
    with pytest.raises(SystemExit) as stopped:
        recipe.main(options(files, study, compare=True, seeds=[0, 1], noise_rate=0.4))
    assert "has a run in it (results.json). Name another folder with --output_dir" in str(stopped.value)


def test_a_study_is_taken_up_where_it_stopped(files, study, tmp_path, capsys):
    results = read_results(study)
    results["records"] = results["records"][:3]
    (tmp_path / "results.json").write_text(json.dumps(results))
    again = options(files, tmp_path, compare=True, seeds=[0, 1], noise_rate=0.4, resume_from_checkpoint="last")
    recipe.main(again)
    assert capsys.readouterr().out.count("recorded already") == 3
    same = ("test_accuracy_last", "label_memory_last", "reset_steps", "history")
    expected, got = read_results(study)["records"][3], read_results(tmp_path)["records"][3]
    assert [got[key] for key in same] == [expected[key] for key in same]


def test_a_study_cut_off_in_its_first_run_is_held_to_its_options_too(files, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(options(files, tmp_path, max_steps=4))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"has another configuration \(learning_rate: 0\.01 there, 0\.5 now\)"):
        recipe.run(options(files, tmp_path, max_steps=4, learning_rate=0.5, resume_from_checkpoint="last"))
    assert len(recipe.run(options(files, tmp_path, max_steps=4))["records"]) == 1  # there is nothing to lose


@pytest.mark.parametrize("probability", [0.5, 0.0])
def test_a_killed_run_ends_as_if_it_had_not_been(files, tmp_path, monkeypatch, probability):
    saving = {"save_strategy": "steps", "save_steps": 4, "noise_rate": 0.4, "reset_probability": probability}
    whole = recipe.run(options(files, tmp_path / "whole", **saving))["records"][0]
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(options(files, tmp_path / "cut", **saving))
    monkeypatch.undo()
    arm = "reset" if probability else "plain"
    folder = tmp_path / "cut" / f"{arm}-seed0"
    (folder / "checkpoint-12" / "trainer_state.json").unlink()  # killed while it was being written
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-8")
    cut = recipe.run(options(files, tmp_path / "cut", **saving, resume_from_checkpoint="last"))["records"][0]
    same = ("test_accuracy_last", "test_accuracy_best", "label_memory_last", "reset_steps", "history", "best_step")
    assert [cut[key] for key in same] == [whole[key] for key in same]


def test_real_noise_trains_on_given_labels_and_tests_on_clean_ones(files, tmp_path):
    record = recipe.run(options(files, tmp_path, label_column="given", clean_label_column="label"))["records"][0]
    assert record["arm"] == "reset"
    assert record["train_mislabelled"] in range(15, 25)
    assert record["validation_labels_right"] < 1
    assert "real noise in given" in (tmp_path / "report.md").read_text()


def test_trusted_validation_is_said(files, tmp_path):
    trusted = options(files, tmp_path, noise_rate=0.4, validation_label_column="clean_label", max_steps=4)
    assert recipe.run(trusted)["records"][0]["validation_labels_right"] == 1
    assert "trusted validation labels" in (tmp_path / "report.md").read_text()


def test_labels_as_given_have_no_memory_to_show(files, tmp_path):
    record = recipe.run(options(files, tmp_path, max_steps=4))["records"][0]
    assert record["label_memory_last"] is None
    assert "label_memory" not in record["history"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # asked for by peft
def test_lora_and_a_local_model(files, study, tmp_path):
    lora = {"lora_rank": 2, "reset_scope": "adapters", "freeze_embeddings": True, "noise_rate": 0.4}
    lora["model_name_or_path"] = study / "plain-seed0" / "model"
    record = recipe.run(options(files, tmp_path, **lora))["records"][0]
    assert record["resets"] > 0
    assert (tmp_path / "reset-seed0" / "model" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"eval_strategy": "no"}, MetricError, "eval_strategy"),
        ({"load_best_model_at_end": True}, ConfigError, "`load_best_model_at_end` is True"),
        ({"reset_metric": "clean_accuracy"}, ConfigError, "--validation_label_column"),
        ({"label_column": "topic"}, DataError, "`label_column` is 'topic'.*It has 'text', 'label', 'given'"),
        ({"dataset_name": "trec"}, ConfigError, "`train_file` and `dataset_name` 'trec' were both given"),
        ({"model_name_or_path": "no/where"}, ConfigError, "`model_name_or_path` 'no/where' cannot be loaded"),
        ({"noise_kind": "matrix", "noise_matrix": "[["}, ConfigError, "`noise_matrix` .* must be rows as JSON"),
        ({"compare": True, "reset_probability": 0}, ConfigError, "`compare` with `reset_probability` 0"),
        ({"seed": 3}, ConfigError, "`seed` 3 would be ignored"),
        ({"noise_rate": "nan"}, ConfigError, "`noise_rate` must be at least 0, got nan"),
        (
            {"lora_rank": 2, "lora_target_modules": "nothing"},
            ConfigError,
            "options refused by peft: No modules were targeted",
        ),
        ({"lora_rank": 2, "lora_target_modules": "(["}, ConfigError, r"`lora_\*` options refused by peft"),
        ({"reset_probability": 1.5}, ConfigError, r"`probability` must be in \[0, 1\], got 1\.5"),
    ],
)
def test_what_cannot_be_run_is_refused(files, tmp_path, more, error, message):
    chosen = options(files, tmp_path / "out", **{"save_steps": 2, "save_strategy": "no", **more})
    if "load_best_model_at_end" in more:
        chosen += ["--save_strategy", "steps"]
    with pytest.raises(error, match=message):
        recipe.run(chosen)


def test_a_folder_that_cannot_be_written_to_ends_in_a_line(files):
    with pytest.raises(SystemExit) as stopped:
        recipe.main(options(files, "/dev/null/runs"))
    assert str(stopped.value).startswith("error: Not a directory: /dev/null/runs")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_parses_and_explains_itself(path):
    parsed, training, _ = parse_recipe(
        [recipe.TextClassificationArguments, ResetTrainingArguments], ["--config", str(path)]
    )
    assert training.eval_strategy == "steps"
    assert parsed.seeds
    header = path.read_text().split("\noutput_dir")[0]
    for heading in ("What:", "Launch:", "Override:", "Takes:", "Expect:"):
        assert heading in header
    assert f"configs/{path.name}" in header
    assert all(key in {**vars(parsed), **vars(training)} for key in yaml.safe_load(path.read_text()))


def test_help_is_quick_and_needs_no_torch():
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__'); sys.exit('torch' in sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 10, "about one second on an idle machine"
    for name in ("--noise_rate", "--text_pair_column", "--clean_label_column", "--seeds", "--compare", "--config"):
        assert name in done.stdout


def test_the_commands_in_the_readme_parse(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", (FOLDER / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        launcher, script, *words = shlex.split(block.replace("accelerate launch", "launch"))
        assert (launcher, script) == ("launch", "recipes/text_classification/train.py")
        words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
        parse_recipe([recipe.TextClassificationArguments, ResetTrainingArguments], words)
