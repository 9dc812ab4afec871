"""The results file is whole and guarded, tables say mean ± sd, figures show every arm."""

import json
import os
import subprocess
import sys

import pytest

from hf_reset.errors import ConfigError, DataError
from hf_reset.report.classification import chosen_by, reading
from hf_reset.report.environment import environment_record, peak_memory_bytes, reset_peak_memory
from hf_reset.report.plots import Panel, arm_styles, plot_runs
from hf_reset.report.results import (
    Results,
    check_output_dir,
    plain,
    read_results,
    series,
)
from hf_reset.report.tables import Column, markdown_report, markdown_table, mean_and_sd, summary_table


def record(arm, seed, **more):
    history = {"validation_loss": [[0, 2.0], [10, 1.0 + seed / 10]]}
    steps = [4, 7] if arm == "reset" else []
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": 0.5 + seed / 10,
        "can_reset": arm == "reset",
        "history": history,
        "reset_steps": steps,
        **more,
    }


def results_in(folder, **more):
    return Results(folder, recipe="r", configuration={"rate": 0.4, "seeds": [0]}, environment={}, **more)


def test_each_record_is_on_disk_at_once(tmp_path):
    results = results_in(tmp_path)
    results.add(record("plain", 0))
    assert [(r["arm"], r["seed"]) for r in read_results(tmp_path)["records"]] == [("plain", 0)]
    results.add(record("plain", 1))
    results.add(record("plain", 0, accuracy=0.9))
    assert {r["seed"]: r["accuracy"] for r in read_results(tmp_path)["records"]} == {0: 0.9, 1: 0.6}
    assert not list(tmp_path.glob(".*tmp")), "the temporary file was renamed"


def test_curves_take_one_line_and_read_back_unchanged(tmp_path):
    results = results_in(tmp_path)
    hard = {
        "text": "[\\n 1,\\n 2\\n]",
        "nested": [[1, 2], [3, 4]],
        "strings": ["a, b", "[c]"],
        "empty": [],
        "none": [[]],
    }
    results.add(record("plain", 0, **hard))
    assert read_results(tmp_path)["records"][0] == plain(record("plain", 0, **hard))
    assert '"nested": [[1, 2], [3, 4]]' in (tmp_path / "results.json").read_text()


def test_other_processes_write_nothing(tmp_path):
    results_in(tmp_path, write=False).add(record("plain", 0))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_run_in_it_is_refused(tmp_path):
    results_in(tmp_path).add(record("plain", 0))
    with pytest.raises(ConfigError, match=r"`output_dir` is .* has a run in it \(results.json\).*--output_dir"):
        results_in(tmp_path)
    taken_up = results_in(tmp_path, resume=True)
    assert taken_up.has("plain", 0)
    assert not taken_up.has("reset", 0)


def test_notes_of_seeds_that_nobody_prepares_again_are_kept(tmp_path):
    first = results_in(tmp_path)
    first.note("all: 3 rows have no label.", "seed 0: 5 rows were cut.")
    first.add(record("plain", 0))
    second = results_in(tmp_path, resume=True)
    second.note("all: 3 rows have no label.", "seed 1: 7 rows were cut.")
    second.add(record("plain", 1))
    said = ["all: 3 rows have no label.", "seed 0: 5 rows were cut.", "seed 1: 7 rows were cut."]
    assert read_results(tmp_path)["notes"] == said


@pytest.mark.parametrize("inside", ["checkpoint-20", "reset-seed0/checkpoint-20"])
def test_checkpoints_without_results_are_a_run_too(tmp_path, inside):
    (tmp_path / inside).mkdir(parents=True)
    with pytest.raises(ConfigError, match=inside):
        check_output_dir(tmp_path, resume=False)
    check_output_dir(tmp_path, resume=True)


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_output_dir(tmp_path / "file", resume=True)


def test_a_run_is_taken_up_with_its_own_configuration_only(tmp_path):
    results_in(tmp_path).add(record("plain", 0))
    more_seeds = {"rate": 0.4, "seeds": [0, 1]}
    Results(tmp_path, recipe="r", configuration=more_seeds, environment={}, resume=True)
    with pytest.raises(ConfigError, match=r"rate: 0\.4 there, 0\.2 now"):
        Results(tmp_path, recipe="r", configuration={"rate": 0.2, "seeds": [0]}, environment={}, resume=True)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_file_of_no_results_is_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results\.json"):
        read_results(tmp_path)


def test_records_of_the_first_version_come_in_todays_form(tmp_path):
    """There an arm's name said whether it reset, and memory at the last step had no suffix."""
    old = [{"arm": "plain", "seed": 0, "label_memory": 0.8, "resets": 0}]
    old += [{"arm": "reset", "seed": 0, "label_memory": 0.2, "resets": 0}]
    (tmp_path / "results.json").write_text(json.dumps({"configuration": {}, "records": old}))
    records = read_results(tmp_path)["records"]
    assert [record["can_reset"] for record in records] == [False, True]
    assert [record["label_memory_last"] for record in records] == [0.8, 0.2]


def test_plain_makes_json_of_what_runs_hold():
    import numpy as np

    value = {"a": np.float32(0.5), "b": float("nan"), "c": (np.int64(3), True), 4: np.arange(2), "s": {"x"}}
    assert plain(value) == {"a": 0.5, "b": None, "c": [3, True], "4": [0, 1], "s": ["x"]}
    json.dumps(plain(value), allow_nan=False)


def test_environment_names_versions_and_device():
    import torch

    environment = environment_record(torch.device("cpu"), processes=2)
    assert environment["packages"]["torch"] == torch.__version__
    assert (environment["device"], environment["processes"]) == ("cpu", 2)


def test_peak_memory_is_that_of_the_run():
    import torch

    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak resident set cannot be reset here")
    device = torch.device("cpu")
    big = bytearray(os.urandom(1 << 20) * 200)
    before = peak_memory_bytes(device)
    del big
    reset_peak_memory(device)
    assert peak_memory_bytes(device) < before - 100 * 2**20


def test_series_reads_a_curve_from_a_log():
    log = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "eval_loss": 1.5}]
    assert series(log, "eval_loss") == [[1, 2.0], [3, 1.5]]


def test_mean_and_sample_deviation():
    assert mean_and_sd([1.0, 3.0, None]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_sd([1.0]) == (1.0, None)
    assert mean_and_sd([None]) is None


def test_the_table_has_a_row_an_arm():
    records = [record("plain", 0), record("reset", 0), record("plain", 1), record("reset", 1)]
    lines = summary_table(records, [Column("accuracy", "accuracy", digits=2), Column("absent", "absent")]).splitlines()
    assert lines[0] == "| arm | seeds | accuracy | absent |"
    assert lines[2:] == ["| plain | 2 | 0.55 ± 0.07 | – |", "| reset | 2 | 0.55 ± 0.07 | – |"]


def test_a_pipe_in_a_cell_does_not_end_it():
    assert markdown_table(["a|b"], [["c"]]).splitlines()[0] == "| a\\|b |"


def test_the_report_says_what_chose_and_what_was_dropped(tmp_path):
    results = results_in(tmp_path)
    results.add(record("plain", 0))
    results.note("3 rows were dropped.")
    results.note("3 rows were dropped.")
    report = markdown_report(
        results.as_dict(), [Column("accuracy", "accuracy")], title="T", chosen_by="noisy ones.", sections={"S": "text"}
    )
    assert "**What chose the anchors:** noisy ones." in report
    assert report.count("3 rows were dropped.") == 1
    assert "## S\n\ntext" in report


def test_the_report_tells_noisy_from_trusted_validation():
    assert "noisy like" in chosen_by("label", None, clean_known=True)
    assert "trusted" in chosen_by("label", "clean_label", clean_known=True)
    assert "trusted" not in chosen_by("label", "label", clean_known=True)


def test_reading_tells_the_two_regimes_apart():
    symmetric = record("reset", 0, resets=9, validation_labels_right=0.6, validation_accuracy_best=0.4)
    systematic = record("reset", 0, resets=0, validation_labels_right=0.54, validation_accuracy_best=0.8)
    assert "resetting can help" in reading([symmetric])
    assert "systematic" not in reading([symmetric])
    assert "systematic" in reading([systematic])
    assert "never began" in reading([systematic])


def test_the_figure_shows_arms_seeds_resets_and_skips_empty_panels(tmp_path):
    records = [record("plain", 0), record("reset", 0), record("reset", 1)]
    panels = [Panel("validation_loss", "loss", "nats", marks_resets=True, final="accuracy"), Panel("none", "n", "y")]
    path = plot_runs(records, panels, tmp_path / "figures" / "curves.svg", title="title")
    drawn = path.read_text()
    for text in ("plain", "reset", "a reset (one row a seed)", "title", "nats", "optimizer step"):
        assert f"<!-- {text} -->" in drawn
    assert "<!-- n -->" not in drawn


def test_any_number_of_arms_is_told_apart_and_none_by_its_name():
    named = [record(f"arm {n}", 0, can_reset=n % 2 == 0) for n in range(6)]
    styles = arm_styles(named)
    assert len(set(styles.values())) == 6
    others = arm_styles([{**one, "arm": one["arm"].upper()} for one in named])
    assert list(others.values()) == list(styles.values())


def test_no_curve_no_figure(tmp_path):
    with pytest.raises(DataError, match="no record has a curve"):
        plot_runs([record("plain", 0)], [Panel("none", "n", "y")], tmp_path / "x.png")


def test_matplotlib_and_torch_are_imported_only_when_needed():
    code = (
        "import sys, hf_reset.report.plots, hf_reset.report.tables, hf_reset.report.results, hf_reset.study.runs, "
        "hf_reset.report.environment, hf_reset.study.options, hf_reset.study.arms, hf_reset.study.splits; "
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
