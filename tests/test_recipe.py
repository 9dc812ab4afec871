"""Options from YAML and command line, files of data, and the loop over arms and seeds."""

import gzip
import json
from dataclasses import dataclass, field

import pytest

from hf_reset.errors import ConfigError, DataError
from hf_reset.report.results import Results
from hf_reset.study.runs import (
    RecipeArguments,
    load_file,
    load_named,
    parse_recipe,
    planned_runs,
    run_arms,
    run_command,
)


@dataclass
class Options:
    noise_rate: float = 0.0
    seeds: list[int] = field(default_factory=lambda: [0])
    compare: bool = False
    train_file: str | None = None


@dataclass
class Training:
    learning_rate: float = 1e-3
    reset_probability: float = 0.01
    max_steps: int = -1
    hub_token: str | None = None


def parsed(tmp_path, yaml="", argv=()):
    (tmp_path / "c.yaml").write_text(yaml or "{}")
    return parse_recipe([Options, Training], ["--config", str(tmp_path / "c.yaml"), *argv])


def test_the_command_line_overrides_the_file(tmp_path):
    yaml = "noise_rate: 0.4\nseeds: [0, 1]\ncompare: true\nlearning_rate: 5e-4\nmax_steps: -1\ntrain_file: null\n"
    options, training, _ = parsed(tmp_path, yaml, ["--seeds", "2", "3", "4", "--compare", "false"])
    assert options == Options(noise_rate=0.4, seeds=[2, 3, 4], compare=False)
    assert training == Training(learning_rate=5e-4)


def test_the_configuration_has_what_was_asked_for_and_no_token(tmp_path):
    *_, configuration = parsed(tmp_path, "learning_rate: 0.1\nhub_token: secret\n", ["--max-steps", "3"])
    assert configuration == {
        "noise_rate": 0.0,
        "seeds": [0],
        "compare": False,
        "train_file": None,
        "learning_rate": 0.1,
        "reset_probability": 0.01,
        "max_steps": 3,
    }


@pytest.mark.parametrize(
    ("yaml", "argv", "message"),
    [
        ("nois_rate: 1\n", [], r"unknown key 'nois_rate' \(the nearest known is 'noise_rate'\)"),
        ("", ["--nois_rate", "1"], r"'--nois_rate' is not known \(the nearest known is 'noise_rate'\)"),
        ("", ["--noise", "1"], "'--noise' is not known"),
        ("noise_rate: much\n", [], "noise_rate.*invalid float value: 'much'"),
        ("- 1\n", [], "must hold `option: value` lines, got list"),
        ("a: [\n", [], "cannot be read"),
    ],
)
def test_what_is_not_an_option_is_refused_by_name(tmp_path, yaml, argv, message):
    with pytest.raises(ConfigError, match=message):
        parsed(tmp_path, yaml, argv)


def test_a_missing_configuration_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"`config` .*none\.yaml' cannot be read"):
        parse_recipe([Options, Training], ["--config", str(tmp_path / "none.yaml")])


def test_both_arms_share_each_seed():
    assert planned_runs([3, 5], compare=True, resets=True) == [
        *[("plain", 3), ("reset", 3)],
        *[("plain", 5), ("reset", 5)],
    ]
    assert planned_runs([0], compare=False, resets=True) == [("reset", 0)]
    assert planned_runs([0], compare=False, resets=False) == [("plain", 0)]


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_needed_and_differ(seeds):
    with pytest.raises(ConfigError, match="`seeds`"):
        planned_runs(seeds, compare=False, resets=True)


def test_comparing_needs_resets():
    with pytest.raises(ConfigError, match="`compare` with `reset_probability` 0"):
        planned_runs([0], compare=True, resets=False)


def test_runs_that_have_a_record_are_skipped(tmp_path):
    results = Results(tmp_path, recipe="r", configuration={}, environment={})
    results.add({"arm": "plain", "seed": 0, "x": 1})
    ran, said = [], []

    def run_one(arm, seed):
        ran.append((arm, seed))
        return {"x": 2}

    run_arms(results, [("plain", 0), ("reset", 0)], run_one, say=said.append)
    assert ran == [("reset", 0)]
    assert [r["x"] for r in results.records] == [1, 2]
    assert "skipped" in said[0]


ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": None}]


def write(path, kind):
    if kind == "csv":
        path.write_text("text,label\na,1\nb,\n")
    elif kind == "tsv":
        path.write_text("text\tlabel\na\t1\nb\t\n")
    elif kind == "parquet":
        from datasets import Dataset

        Dataset.from_list(ROWS).to_parquet(path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        if kind == "jsonl.gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "jsonl.gz", "parquet"])
def test_files_of_every_kind_are_read(tmp_path, kind):
    rows = load_file(write(tmp_path / f"rows.{kind}", kind), argument="train_file")
    assert rows["text"][:] == ["a", "b"]
    assert rows["label"][:] == [1, None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", "a", r"`train_file` .*rows\.txt' has none of the suffixes csv"),
        ("rows.json", "{", "cannot be read as json, or is empty"),
        ("rows.csv", "", "cannot be read as csv, or is empty"),
        ("none.csv", None, "is not a file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_file(tmp_path / name, argument="train_file")


def test_an_unknown_data_set_is_named_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"`dataset_name` .* cannot be loaded .*--train_file"):
        load_named(str(tmp_path / "nothing"))


def test_a_local_directory_is_a_data_set(tmp_path):
    write(tmp_path / "train.csv", "csv")
    assert load_named(str(tmp_path))["train"].num_rows == 2


def test_a_command_that_has_done_its_work_ends_the_process_group():
    """Else a thread of gloo may touch the interpreter while it shuts down, and torch aborts the process."""
    import torch.distributed as dist

    def run(argv):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if argv:
            raise ConfigError("`argv` is not empty.")

    run_command(run, RecipeArguments, description="", argv=[])
    assert not dist.is_initialized()
    with pytest.raises(SystemExit, match="error: `argv` is not empty"):
        run_command(run, RecipeArguments, description="", argv=["--seeds"])
    dist.destroy_process_group()  # an error of one rank alone must not wait for the others
