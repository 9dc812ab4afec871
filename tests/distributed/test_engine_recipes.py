"""The accelerate configurations, recipes run under each by changing only that file, and what is refused."""

import json
import random
import sys
from pathlib import Path

import pytest
import yaml
from launch import HERE, deepspeed_python, launch
from recipe import launcher_environment

RECIPES = HERE.parent.parent / "recipes"
ENGINES = ["ddp", "fsdp2", *(pytest.param(name, marks=pytest.mark.deepspeed) for name in ("zero2", "zero3"))]
SHORT = ["--max_steps", "6", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "4"]
SHORT += ["--hidden_size", "64", "--reset_probability", "0.5", "--reset_patience", "0"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single", {"ACCELERATE_USE_CPU": "False"}),
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("zero3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
    ],
)
def test_accelerate_reads_each_configuration(name, expected):
    given = launcher_environment(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert {key: given.get(key) for key in expected} == expected


def test_there_is_no_other_configuration():
    names = {path.stem for path in (RECIPES / "accelerate").glob("*.yaml")}
    assert names == {"single", "ddp", "fsdp2", "zero2", "zero3"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Texts of three kinds with a few words each, and as many prompts."""
    folder, chance = tmp_path_factory.mktemp("rows"), random.Random(0)
    with open(folder / "texts.jsonl", "w") as texts, open(folder / "pairs.jsonl", "w") as pairs:
        for row in range(150):
            kind = row % 3
            words = " ".join(chance.choice([f"w{kind}{k}" for k in range(5)] + ["the", "of"]) for _ in range(8))
            texts.write(json.dumps({"text": words, "label": "abc"[kind]}) + "\n")
            pairs.write(
                json.dumps({"prompt": f"colour {kind} in row {row}", "completion": "red blue green".split()[kind] * 3})
                + "\n"
            )
    return folder


def run_recipe(engine, recipe, options, python=sys.executable):
    config = RECIPES / recipe / "configs" / "quickstart.yaml"
    given = ["--config", config, *SHORT, *options]
    script = RECIPES / recipe / "train.py"
    engine = engine if isinstance(engine, Path) else RECIPES / "accelerate" / f"{engine}.yaml"
    run = launch(HERE / "recipe.py", engine, script, *given, python=python, timeout=200, CHECK_SECONDS="180")
    assert run.status == 0, run.output[-6000:]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_the_text_recipe_runs_by_changing_only_the_configuration(engine, rows, tmp_path):
    options = ["--train_file", rows / "texts.jsonl", "--vocab_size", "100", "--output_dir", tmp_path]
    run_recipe(engine, "text_classification", options, python=python_for(engine))
    (record,) = json.loads((tmp_path / "results.json").read_text())["records"]
    assert record["arm"] == "reset + refine"
    assert (tmp_path / "reset+refine-seed0" / "model" / "model.safetensors").is_file()


@pytest.mark.distributed
def test_the_text_recipe_runs_under_fsdp1(rows, tmp_path):
    """No configuration for it is ours to offer, since transformers is about to drop it; those who have one go on."""
    config = yaml.safe_load((RECIPES / "accelerate" / "fsdp2.yaml").read_text())
    config["fsdp_config"] |= {"fsdp_version": 1, "fsdp_reshard_after_forward": "FULL_SHARD"}
    config["fsdp_config"] |= {"fsdp_use_orig_params": True, "fsdp_state_dict_type": "FULL_STATE_DICT"}
    config["fsdp_config"]["fsdp_sync_module_states"] = False  # needs an accelerator
    (tmp_path / "fsdp1.yaml").write_text(yaml.safe_dump(config))
    options = ["--train_file", rows / "texts.jsonl", "--vocab_size", "100", "--output_dir", tmp_path / "out"]
    run_recipe(tmp_path / "fsdp1.yaml", "text_classification", options)
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert record["arm"] == "reset + refine"
    assert (tmp_path / "out" / "reset+refine-seed0" / "model" / "model.safetensors").is_file()


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_the_instruction_recipe_runs_by_changing_only_the_configuration(engine, rows, tmp_path):
    few = ["--max_train_samples", "60", "--max_eval_samples", "16", "--max_predict_samples", "16"]
    few += ["--generation_samples", "2", "--max_new_tokens", "2", "--memory_samples", "8", "--base_steps", "2"]
    few += ["--vocab_size", "300", "--num_hidden_layers", "2", "--per_device_train_batch_size", "4"]
    options = ["--train_file", rows / "pairs.jsonl", "--output_dir", tmp_path, *few]
    run_recipe(engine, "instruction_tuning", options, python=python_for(engine))
    (record,) = json.loads((tmp_path / "results.json").read_text())["records"]
    assert record["arm"] == "reset"
    assert (tmp_path / "reset-seed0" / "model" / "adapter_model.safetensors").is_file()


def python_for(engine):
    return deepspeed_python() if engine.startswith("zero") else sys.executable
