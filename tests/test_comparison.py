"""Studies of many methods: the plan's order, who takes which run, and the figures of the table by hand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from scripts import load_script

from hf_reset.cli import main
from hf_reset.errors import ConfigError, DataError
from hf_reset.report.best_of import best_of, settled_table
from hf_reset.report.comparison import (
    baseline_of,
    cells_table,
    choices_table,
    comparison_table,
    difference,
    headline_table,
    last_weights_table,
    line,
    lines_of,
    suspects_table,
)
from hf_reset.report.rivals import best_rivals_table, rivals_table
from hf_reset.study.arms import PLAIN, RESET, Arm
from hf_reset.study.cells import complete
from hf_reset.study.classification import ClassificationData
from hf_reset.study.comparison import Plan, Run, Setting, claim, pending, read_records, record_path

TREC, NEWS = Setting("trec", "symmetric", 0.4), Setting("ag_news", "pair", 0.4)


def plan(**more):
    return Plan(**{"defaults": {}, "settings": [TREC, NEWS], "arms": [PLAIN, RESET], "seeds": [0, 1], **more})


def test_names_say_data_and_noise():
    assert TREC.name == "trec-symmetric40"
    assert Setting("wrench_trec", "real").name == "wrench_trec-real"
    assert Setting("trec").name == "trec-clean"
    assert Setting("trec", "pair", 0.4, variant="all").name == "trec_all-pair40"


def test_stages_come_in_order_and_no_run_twice():
    stages = [{"arms": ["reset"], "settings": ["ag_news-pair40"]}, {}]
    names = [run.name for run in plan(stages=stages).runs()]
    assert names[:2] == ["ag_news-pair40--reset--seed0", "ag_news-pair40--reset--seed1"]
    assert len(names) == len(set(names)) == 8


def test_what_is_there_is_skipped(tmp_path):
    first, *rest = plan().runs()
    record_path(tmp_path, first).write_text("{}")
    assert pending(plan(), tmp_path) == rest
    assert claim(tmp_path, first) is None


def test_a_claim_holds_while_its_process_lives(tmp_path):
    run = Run(TREC, PLAIN, 0)
    mark = claim(tmp_path, run)
    assert mark is not None
    assert claim(tmp_path, run) is None
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    mark.write_text(gone.stdout.decode())
    assert claim(tmp_path, run) == mark
    assert mark.read_text() == str(os.getpid())


def test_a_plan_in_yaml(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(
        "defaults: {max_steps: 3}\nsettings: [{dataset: trec, noise_kind: symmetric, noise_rate: 0.4}]\n"
        "arms: {plain: , reset: {reset_probability: 0.1}}\nseeds: [0]\nstages: [{arms: [plain]}]\n"
    )
    read = Plan.read(file)
    assert read.arms == [Arm("plain"), Arm("reset", {"reset_probability": 0.1})]
    assert [run.name for run in read.runs()] == ["trec-symmetric40--plain--seed0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0]\n", "It needs `defaults`, `settings`, `arms` and `seeds`"),
        ("[", "cannot be read"),
        (
            "defaults: {}\nsettings: []\narms: {plain: {}}\nseeds: [0]\nstages: [{arms: [plane]}]\n",
            "a stage with arms 'plane', which it has not",
        ),
        ("defaults: {}\nsettings: [{data: x}]\narms: {}\nseeds: []\n", "cannot be read"),
    ],
)
def test_a_plan_that_is_none(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Plan.read(tmp_path / "plan.yaml")


@pytest.mark.parametrize("name", ["comparison", "sst2", "settled", "auto", "racing_clock"])
def test_the_committed_plans_read(request, name):
    path = request.config.rootpath / f"recipes/studies/plans/{name}.yaml"
    runs = list(Plan.read(path).runs())
    assert len(runs) == len({run.name for run in runs})
    if name in ("comparison", "sst2"):
        assert runs[0].arm.name == "plain"  # the baseline of everything


@pytest.fixture(scope="module")
def study():
    return load_script("studies/run.py")


def few_rows(*, clean=(0, 1, 2, 0, 1)):
    """Training and validation rows of which every label is wrong."""
    wrong = [(label + 1) % 3 for label in clean]
    columns = {"text": list("abcde"), "label": wrong, "clean_label": list(clean), "is_mislabelled": [True] * 5}
    rows = Dataset.from_dict(columns)
    return ClassificationData(train=rows, validation=rows, test=rows, names=["x", "y", "z"])


def test_true_labels_of_validation_may_choose_or_be_all_there_is_to_train_on(study):
    data = few_rows()
    assert study.with_clean_labels(data, {"reset_probability": 0.02}) is data
    chosen = study.with_clean_labels(data, {"validate_on": "clean labels"})
    assert chosen.train is data.train
    assert chosen.validation["label"] == chosen.validation["clean_label"] == [0, 1, 2, 0, 1]
    alone = study.with_clean_labels(data, {"train_on": "clean validation"})
    assert study.with_clean_labels(data, {"then_train_on": "clean validation"}).train["text"] == alone.train["text"]
    assert (alone.train["text"], alone.train["label"]) == (["b", "c", "d", "e"], [1, 2, 0, 1])
    assert (alone.validation["text"], alone.validation["label"]) == (["a"], [0])
    assert not any(alone.train["is_mislabelled"])
    assert not any(chosen.validation["is_mislabelled"])


def test_true_labels_that_a_study_does_not_know(study):
    with pytest.raises(ConfigError, match="validate_on must be 'clean labels', got 'gold'"):
        study.with_clean_labels(few_rows(), {"validate_on": "gold"})
    with pytest.raises(ConfigError, match="train_on and validate_on both take the true labels"):
        study.with_clean_labels(few_rows(), {"train_on": "clean validation", "validate_on": "clean labels"})
    with pytest.raises(ConfigError, match="train_on needs the true label of each validation row"):
        study.with_clean_labels(few_rows(clean=(0, 1, 2, 0, -1)), {"train_on": "clean validation"})


def record(setting, arm, seed, ours=False, **accuracy):
    return {
        "setting": {"name": setting},
        "arm": arm,
        "seed": seed,
        "is_ours": ours,
        "train_seconds": 10.0,
        "test_accuracy": accuracy,
    }


RECORDS = [
    record("a", "plain", 0, last=0.5, loss=0.80, accuracy=0.70, calibrated=0.8),
    record("a", "plain", 1, last=0.5, loss=0.80, accuracy=0.84, calibrated=0.8),
    record("b", "plain", 0, last=0.6, loss=0.50, accuracy=0.60, calibrated=0.6),
    record("b", "plain", 1, last=0.6, loss=0.54, accuracy=0.60, calibrated=0.6),
    record("a", "reset", 0, ours=True, last=0.9, loss=0.1, accuracy=0.1, calibrated=0.90),
    record("a", "reset", 1, ours=True, last=0.9, loss=0.1, accuracy=0.1, calibrated=0.88),
    record("b", "reset", 0, ours=True, last=0.9, loss=0.1, accuracy=0.1, calibrated=0.59),
]


def test_the_baseline_is_the_stronger_choice_on_each_setting():
    baseline = baseline_of(RECORDS)
    assert baseline.cells["a"] == {0: 0.80, 1: 0.80}  # mean 0.80 by loss, 0.77 by accuracy: no seed picks its own
    assert baseline.cells["b"] == {0: 0.60, 1: 0.60}


def test_the_difference_is_paired_by_setting_and_seed():
    ours = next(one for one in lines_of(RECORDS) if one.arm == "reset")
    assert ours.reading == "calibrated"
    gap = difference(ours, baseline_of(RECORDS), ["a", "b"])
    assert gap.mean == pytest.approx((9.0 - 1.0) / 2)  # points: (10 + 8) / 2 on a, seed 0 alone on b
    assert (gap.wins, gap.ties, gap.losses) == (1, 0, 1)
    assert gap.worst == pytest.approx(-1.0)
    assert gap.low <= gap.mean <= gap.high
    assert difference(ours, baseline_of(RECORDS), ["nowhere"]) is None


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """95 % nominal; settings are few, so a bootstrap over them is known to fall short: at least 85 %."""
    rng, hits, runs = np.random.default_rng(0), 0, 60
    for draw in range(runs):
        records = []
        for setting in range(12):
            effect = rng.normal(0.03, 0.02)
            for seed in range(3):
                base = 0.7 + rng.normal(0, 0.01)
                records.append(record(f"s{setting}", "plain", seed, loss=base, accuracy=0.0))
                value = base + effect + rng.normal(0, 0.01)
                records.append(record(f"s{setting}", "reset", seed, ours=True, calibrated=value))
        gap = difference(
            line(records, "reset", "calibrated"), baseline_of(records), [f"s{k}" for k in range(12)], seed=draw
        )
        hits += gap.low <= 3.0 <= gap.high
    assert hits / runs > 0.95 - 0.1 - 3 * np.sqrt(0.95 * 0.05 / runs)


def test_cells_stand_a_row_a_setting():
    lines = cells_table(RECORDS).splitlines()
    assert lines[0] == "| setting | seeds | best checkpoint | plain, last | reset | reset, by accuracy |"
    assert lines[2] == "| a | 2 | 0.800 ± 0.000 | 0.500 ± 0.000 | 0.890 ± 0.014 | 0.100 ± 0.000 |"
    assert lines[3] == "| b | 2 | 0.600 ± 0.000 | 0.600 ± 0.000 | 0.590 | 0.100 |"
    assert "| a | 2 | 0.800 ± 0.000 | 0.890" in cells_table(RECORDS, ["reset"])
    rare = [*RECORDS, record("a", "rare", 0, loss=0.7, accuracy=0.7)]
    assert "rare" not in cells_table(rare)  # of one setting in two


def test_the_headline_is_of_the_settings_that_all_have():
    records = [*RECORDS, record("c", "plain", 0, last=0.1, loss=0.1, accuracy=0.1, calibrated=0.1)]
    lines = headline_table(records, ["a", "b", "c"], ["reset"]).splitlines()
    assert "mean of 2 columns" in lines[0]
    assert lines[2].startswith("| plain, last step | 55.0 % | -15.0 (")
    assert lines[3] == "| plain, best checkpoint | 70.0 % | – | – | – |"
    assert lines[4].startswith("| reset | 74.0 % | +4.0 (")
    assert lines[4].endswith("| -1.0 | 1 / 0 / 1 |")
    assert lines[5].startswith("| reset, by accuracy | 10.0 % |")
    with pytest.raises(DataError, match="there is no setting that"):
        headline_table(records, ["c"], ["reset"])


def test_beside_a_rival_only_the_runs_that_both_have_count():
    records = [*RECORDS, record("a", "rival", 0, last=0.1, loss=0.85, accuracy=0.95, calibrated=0.1)]
    lines = rivals_table(records, "reset").splitlines()
    rival = next(line for line in lines if line.startswith("| rival"))
    # Of seed 0 on a alone: 0.95, the stronger of its two, and ours 0.90, beside the best checkpoint's 0.80.
    assert rival == "| rival | 1 | +15.0 | +10.0 | -5.0 (-5.0 to -5.0) | 0 / 0 / 1 |"
    assert "| plain, by last | 3 | -15.0 | +4.0 | +19." not in rival
    assert next(line for line in lines if line.startswith("| plain, by last")).split(" | ")[1:4] == [
        "3",
        "-15.0",
        "+4.0",
    ]
    assert not any(line.startswith("| reset") for line in lines)
    with pytest.raises(DataError, match="no record of the arm 'nobody'"):
        rivals_table(records, "nobody")


def test_on_each_setting_the_rival_that_is_best_beside_ours():
    records = [
        *RECORDS,  # ours: 0.90 and 0.88 on a, 0.59 on b
        record("a", "good", 0, loss=0.905, accuracy=0.5),  # the highest, and ahead by 0.5 on the seed that it has
        record("a", "steady", 0, loss=0.90, accuracy=0.5),  # level, and ahead by 2.0 on the next seed
        record("a", "steady", 1, loss=0.90, accuracy=0.5),
        record("b", "good", 0, loss=0.50, accuracy=0.58),
        record("b", "good", 1, loss=0.50, accuracy=0.99),  # ours has no such run
        {**record("b", "control", 0, loss=0.99, accuracy=0.99), "overrides": {"train_on": "clean validation"}},
        {**record("b", "chosen", 0, loss=0.99, accuracy=0.99), "overrides": {"validate_on": "clean labels"}},
    ]
    lines = best_rivals_table(records, "reset").splitlines()[2:]
    assert lines == [
        "| a | 2 | steady | 2 | 0.900 ± 0.000 | 0.890 ± 0.014 | -1.0 |",
        "| b | 1 | good | 1 | 0.580 | 0.590 | +1.0 |",
        "| won / tied / lost; mean |  |  |  |  | 1 / 0 / 1 | +0.0 |",
    ]
    assert best_rivals_table(RECORDS, "reset") == "No other method was run where reset was."


def test_last_weights_stand_beside_what_validation_would_choose():
    records = [*RECORDS, record("a", "smooth", 0, last=0.79, loss=0.7, accuracy=0.82)]
    rows = [row.split(" | ") for row in last_weights_table(records).splitlines()[2:]]
    assert [row[0] for row in rows] == ["| reset", "| smooth", "| plain"]  # in the order of their last weights
    assert rows[0][1:] == ["2", "+4.0", "+20.0 (+10.0 to +30.0)", "+10.0", "2 / 0 / 0 |"]  # 10 points on a, 30 on b
    assert rows[1][1:3] == ["1", "+2.0"]
    assert rows[2][1:] == ["2", "+0.0", "-15.0 (-30.0 to +0.0)", "-30.0", "0 / 1 / 1 |"]
    assert len(last_weights_table(records, ["b"]).splitlines()) == 4  # "smooth" was not run there


def test_many_settings_are_left_to_the_table_of_cells():
    many = [{**one, "setting": {"name": f"{one['setting']['name']}{k}"}} for one in RECORDS for k in range(3)]
    assert "a0" not in comparison_table(many)
    assert "| reset | calibrated | 6 | +4.0 (" in comparison_table(many)


def test_suspects_of_many_settings_stand_a_row_a_setting():
    many = [{**one, "setting": {"name": f"{one['setting']['name']}{k}"}} for one in RECORDS for k in range(3)]
    lines = suspects_table([{**one, "suspects_auroc": 0.9} for one in many]).splitlines()
    assert lines[0] == "| setting | plain, row memory | reset, row memory |"
    assert lines[2] == "| a0 | 0.900 ± 0.000 | 0.900 ± 0.000 |"
    assert len(lines) == 2 + 6
    assert suspects_table([{**one, "suspects_auroc": 0.9} for one in RECORDS]).startswith(
        "| method | ranked by | a | b |"
    )


def test_choices_of_plain_training_stand_beside_the_noise_that_was_fitted():
    more = {"best_step": {"calibrated": 20}, "history": {"label_noise": [[10, 0.1], [20, 0.38]]}}
    records = [{**one, **more, "validation_wrong": 0.4} for one in RECORDS]
    lines = choices_table(records).splitlines()
    assert lines[2] == "| a | 2 | 0.800 ± 0.000 | 0.770 ± 0.099 | 0.800 ± 0.000 | 0.380 ± 0.000 | 0.400 |"
    assert lines[-1] == "| mean |  | 0.660 | 0.685 | 0.700 |  |  |"


def with_history(one, *values):
    return {**one, "history": {"accuracy": [[10 * place, value] for place, value in enumerate(values)]}}


def test_of_two_runs_noisy_accuracy_takes_one():
    records = [
        with_history(record("a", "x", 0, calibrated=0.9), 0.2, 0.6, 0.3),
        with_history(record("a", "y", 0, calibrated=0.1), 0.5, 0.5),
        with_history(record("a", "x", 1, calibrated=0.9), 0.4),
        with_history(record("a", "y", 1, calibrated=0.1), 0.41),
        with_history(record("b", "x", 0, calibrated=0.3), 0.5),
        with_history(record("b", "y", 0, calibrated=0.2), 0.5),  # as good: the arm named first
        with_history(record("b", "x", 1, calibrated=0.3), 0.5),  # alone
    ]
    found = best_of(records, ["x", "y"])
    assert line(found, "best of x, y", "calibrated").cells == {"a": {0: 0.9, 1: 0.1}, "b": {0: 0.3}}
    assert {one["train_seconds"] for one in found} == {20.0}
    assert records[0]["arm"] == "x"
    for arms in (["x"], ["x", "x"], ["x", "z"]):
        with pytest.raises(DataError, match="takes two arms, and a setting and seed they share"):
            best_of(records, arms)


def test_a_parameter_is_settled_by_noisy_accuracy_alone():
    records = [
        with_history(record("a", "x, p 1", 0, accuracy=0.9), 0.5, 0.6),
        with_history(record("b", "x, p 1", 0, accuracy=0.7), 0.5, 0.4),
        with_history(record("a", "x, p 2", 0, accuracy=0.4), 0.58, 0.2),
        with_history(record("b", "x, p 2", 0, accuracy=0.4), 0.6, 0.2),
        with_history(record("a", "y, q 1", 0, accuracy=0.4), 0.5),
        with_history(record("b", "y, q 1", 0, accuracy=0.4), 0.5),
        # As good as the next one, which sums to more in floats.
        with_history(record("a", "z, s 1", 0, accuracy=0.4), 0.4125),
        with_history(record("b", "z, s 1", 0, accuracy=0.4), 0.385),
        with_history(record("a", "z, s 2", 0, accuracy=0.4), 0.3975),
        with_history(record("b", "z, s 2", 0, accuracy=0.4), 0.4),
    ]
    arms = ["x, p 1", "x, p 2", "z, s 1", "z, s 2", "y, q 1"]
    assert settled_table(records, arms).splitlines()[2:] == [
        "| x | p 1: 0.550 (0.800) | p 2: 0.590 (0.400) | p 2 |",  # though its clean accuracy is the lower
        "| z | s 1: 0.399 (0.400) | s 2: 0.399 (0.400) | s 1 |",
        "| y | q 1: 0.500 (0.400) |  | q 1 |",
    ]
    with pytest.raises(DataError, match="'y, q 1' lacks 1 of 2 runs"):
        settled_table([one for one in records if one["setting"]["name"] == "a" or one["arm"] != "y, q 1"], arms)


def test_an_arm_that_was_not_run_is_said():
    with pytest.raises(DataError, match="no record of the arm 'ema'"):
        line(RECORDS, "ema", "loss")


def test_the_command_prints_the_table_and_draws(tmp_path, capsys):
    more = {"best_step": {"calibrated": None}, "history": {"accuracy": [[10, 0.5]]}}
    for number, one in enumerate(RECORDS):
        name = f"{one['setting']['name']}--{one['arm']}--seed{number}"
        (tmp_path / f"{name}.json").write_text(json.dumps({**one, "suspects_auroc": 0.9 if number else 0.8, **more}))
    assert main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert comparison_table(read_records(tmp_path)) in printed
    assert suspects_table(read_records(tmp_path)) in printed
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert main(["compare", str(tmp_path), "--settings", "c"]) == 2
    assert "`settings` 'c' is not in the study; it has a, b." in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "empty")]) == 2
    assert main(["compare", str(tmp_path), "--best_of", "plain", "reset"]) == 0
    assert "| best of plain, reset | loss/accuracy |" in capsys.readouterr().out


def test_the_command_holds_others_beside_ours_that_most_columns_have(tmp_path, capsys):
    more = {"best_step": {"calibrated": None}, "history": {"accuracy": [[10, 0.5]]}}
    part = record("a", "part", 0, ours=True, last=0.9, loss=0.1, accuracy=0.1, calibrated=0.90)
    for number, one in enumerate([*RECORDS, part]):
        (tmp_path / f"run--{number}--seed0.json").write_text(json.dumps({**one, **more}))
    assert main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "reset beside each other method" in printed  # on both columns
    assert "part beside each other method" not in printed  # on one of two
    assert main(["compare", str(tmp_path), "--settings", "a", "--beside", "part"]) == 0
    printed = capsys.readouterr().out
    assert "part beside each other method" in printed
    assert "reset beside each other method" not in printed
    assert main(["compare", str(tmp_path), "--beside", "nobody"]) == 2
    assert "no record of the arm 'nobody'" in capsys.readouterr().err


def test_a_study_of_cells_goes_on_where_its_file_ends_and_keeps_what_it_has(tmp_path):
    path, ran = tmp_path / "new" / "cells.json", []

    def carry_out(cell):
        if cell["rate"] == 3:
            raise KeyboardInterrupt
        ran.append(cell)
        return {"twice": 2 * cell["rate"]}

    with pytest.raises(KeyboardInterrupt):
        complete(path, [{"rate": 1}, {"rate": 2}, {"rate": 3}], carry_out, arms=["a"])
    records = complete(path, [{"rate": 4}, {"rate": 2}, {"rate": 1}], carry_out, arms=["a"])
    assert ran == [{"rate": 1}, {"rate": 2}, {"rate": 4}]
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["records"] == records == [{"rate": rate, "twice": 2 * rate} for rate in (1, 2, 4)]
    assert content["arms"] == ["a"]
    assert "environment" in content
