"""The instruction-tuning recipe from end to end, on settings so small that a run takes a second."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel
from scripts import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reset.corpora import train_tokenizer
from hf_reset.corpora.small_llama import small_llama
from hf_reset.errors import ConfigError, DataError, ResetError, ScopeError
from hf_reset.report.results import read_results

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),  # set by SFTConfig
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),  # modules_to_save, meant
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # asked for by peft
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

FOLDER = Path(__file__).parents[1] / "recipes" / "instruction_tuning"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
QUICKSTART = FOLDER / "configs" / "quickstart.yaml"
TEXTS = [f"Return the {word} of row {row}." for row in range(30) for word in ("name", "size", "last value")]


recipe = load_script("instruction_tuning/train.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, data files and a tokenizer that others share."""
    folder = tmp_path_factory.mktemp("recipe")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 400}
    small_llama(folder / "base", TEXTS, **sizes, steps=2, positions=96, use_cpu=True)
    rows = [{"instruction": f"Say {text}", "input": "", "output": text} for text in TEXTS]
    write(folder / "train.jsonl", rows)
    solutions = [
        {"question": f"{n} and {n}?", "answer": f"{n}+{n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in range(40)
    ]
    write(folder / "sums.jsonl", solutions)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(folder, output, **more):
    """Command line of a run of seconds on the files of ``folder``."""
    given = {
        "config": QUICKSTART,
        "output_dir": output,
        "model_name_or_path": folder / "base",
        "train_file": folder / "train.jsonl",
        "max_seq_length": 64,
        "max_train_samples": 24,
        "max_eval_samples": 8,
        "max_predict_samples": 8,
        "max_steps": 6,
        "eval_steps": 2,
        "lora_rank": 2,
        "lora_alpha": 4,
        "per_device_train_batch_size": 4,
        "reset_probability": 0.6,
        "reset_patience": 0,
        "generation_samples": 2,
        "max_new_tokens": 4,
        "use_cpu": True,
        "report_to": "none",
        **more,
    }
    words = []
    for name, value in given.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def test_plain_beside_reset_from_end_to_end(folder, tmp_path, capsys):
    out = tmp_path / "out"
    recipe.main(options(folder, out, compare=True, seeds=[0, 1]))
    results = read_results(out)
    records = results["records"]
    assert [(record["arm"], record["seed"]) for record in records] == [
        ("plain", 0),
        ("reset", 0),
        ("plain", 1),
        ("reset", 1),
    ]
    for record in records:
        for key in ("test_loss", "test_token_accuracy", "rouge_l", "response_memory"):
            assert isinstance(record[f"{key}_last"], float)
            assert isinstance(record[f"{key}_best"], float)
        assert (record["train_rows"], record["train_corrupted"]) == (24, round(0.4 * 24))
        assert (record["resets"] > 0) == (record["arm"] == "reset")
        assert len(record["reset_steps"]) == record["resets"]
        assert [step for step, _ in record["history"]["clean_loss"]] == [0, 2, 4, 6]
        assert record["history"]["response_memory"][-1][0] == 6
        assert len(record["samples"]) == 2
        best = min(record["history"]["validation_loss"], key=lambda point: point[1])
        assert record["best_metric"] == best[1]
    assert records[0]["history"]["clean_loss"][0] == records[1]["history"]["clean_loss"][0]  # the same start
    anchor = 4 * records[1]["trainable_parameters"]  # float32; weights and AdamW's two moments, and a count a tensor
    assert 3 * anchor < records[1]["anchor_bytes"] < 3.1 * anchor
    assert records[0]["anchor_bytes"] == 0
    report = (out / "report.md").read_text()
    assert "| prompt | clean response | plain | reset |" in report
    assert "No test split was given: 8 of 90 training rows were taken for it." in report
    assert (out / "curves.png").stat().st_size > 1000
    assert "clean test" in capsys.readouterr().out


def test_a_run_that_refines_has_an_arm_of_its_own_and_lists_the_suspect_responses(folder, tmp_path):
    more = {"max_steps": 18, "eval_steps": 6, "reset_refine": "soft", "reset_smooth": True, "compare": True}
    results = recipe.run(options(folder, tmp_path, **more))
    plain, reset, refined = results["records"]
    assert [plain["arm"], reset["arm"], refined["arm"]] == ["plain", "reset", "reset + refine"]
    losses = [loss for _, loss in plain["history"]["validation_loss"]]
    means = [losses[0], *((a + b) / 2 for a, b in itertools.pairwise(losses))]
    assert plain["best_metric"] == min(means), "all arms judge alike"
    for record in (plain, reset):
        assert "most_suspect" not in record, "only a run that refines has a memory of responses"
    worst = refined["most_suspect"]
    assert len(worst) == 10
    assert [row["label_quality"] for row in worst] == sorted(row["label_quality"] for row in worst)
    assert 0 <= refined["suspects_auroc"] <= 1
    table = pd.read_csv(tmp_path / "reset+refine-seed0" / "suspects.csv", index_col="row")
    assert len(table) == 24
    assert table["is_wrong"].sum() == refined["train_corrupted"]
    assert {"prompt", "response", "label_quality", "loss", "reference_loss", "rank"} <= set(table.columns)
    for row in worst:
        assert table.loc[row["row"], "response"] == row["response"]
    report = (tmp_path / "report.md").read_text()
    assert "Most suspect responses" in report
    assert worst[0]["response"][:40] in report


def test_the_saved_adapter_is_the_best_one_and_loads_by_itself(folder, tmp_path):
    from hf_reset.diagnostics.responses import response_scores
    from hf_reset.study.instructions import encode, prepare_instructions
    from hf_reset.study.splits import load_file

    recipe.run(options(folder, tmp_path))
    record = read_results(tmp_path)["records"][0]
    saved = tmp_path / "reset-seed0" / "model"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    sizes = {"max_train_samples": 24, "max_eval_samples": 8, "max_predict_samples": 8}
    raw = {"train": load_file(folder / "train.jsonl", argument="train_file")}
    data = prepare_instructions(raw, noise_rate=0.4, seed=0, **sizes)
    tokens, _ = encode(data.test, tokenizer, 64)
    assert response_scores(model, tokens)["loss"] == pytest.approx(record["test_loss_best"], rel=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        {"trainer": "sft", "bf16": False},
        {"trainer": "sft", "bf16": False, "packing": True, "packing_strategy": "wrapped", "eval_packing": False},
        {"use_dora": True},
        {"use_rslora": True, "lora_modules_to_save": ["lm_head"], "ensure_weight_tying": None},
        {"full_finetuning": True, "reset_scope": "mlp"},
        {"activation_checkpointing": True},
        {"loss": "gce", "loss_options": '{"q": 0.5}'},
        {"trainer": "sft", "bf16": False, "loss": "sce"},
    ],
    ids=["sft", "sft-packing", "dora", "modules_to_save", "full", "checkpointing", "gce", "sft-sce"],
)
def test_variants_run(folder, tmp_path, more):
    more = {key: value for key, value in more.items() if value is not None}
    record = recipe.run(options(folder, tmp_path, **more))["records"][0]
    assert record["resets"] > 0
    assert record["steps"] == 6


def test_both_trainers_train_on_the_same_tokens(folder, tmp_path):
    plain = recipe.run(options(folder, tmp_path / "a", activation_checkpointing=False))["records"][0]
    more = {"trainer": "sft", "bf16": False, "activation_checkpointing": False}
    sft = recipe.run(options(folder, tmp_path / "b", **more))["records"][0]
    assert plain["reset_steps"] == sft["reset_steps"]
    for (step, a), (other_step, b) in zip(*(r["history"]["clean_loss"] for r in (plain, sft)), strict=True):
        assert step == other_step
        assert a == pytest.approx(b, rel=1e-4)


def test_robust_loss_is_the_one_trained_and_evaluated(folder, tmp_path):
    """GCE at q = 1 is 1 - p, so it lies in [0, 1]; cross-entropy of an untrained model lies near log 400."""
    record = recipe.run(options(folder, tmp_path, loss="gce", loss_options='{"q": 1.0}'))["records"][0]
    assert all(0 < value <= 1 for _, value in record["history"]["validation_loss"])
    assert record["test_loss_last"] > 1  # reported in nats all the same


def test_checkable_answers_are_matched_and_corrupted(folder, tmp_path):
    more = {"train_file": folder / "sums.jsonl", "noise_kind": "wrong_answer"}
    record = recipe.run(options(folder, tmp_path, **more))["records"][0]
    assert record["train_corrupted"] == round(0.4 * 24)
    assert record["exact_match_last"] == 0.0


def test_the_small_llama_is_trained_once_and_kept(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 400, "base_steps": 2}
    more = {"train_file": None, "model_name_or_path": None, **sizes}
    given = options(Path(), tmp_path, **more, compare=True)
    recipe.run(given)
    (base,) = tmp_path.glob("base-*")
    before = {file.name: file.stat().st_mtime_ns for file in base.iterdir()}
    (tmp_path / "results.json").unlink()
    for run in tmp_path.glob("*-seed0"):
        run.rename(tmp_path.parent / f"old-{run.name}")
    recipe.run(given)
    assert list(tmp_path.glob("base-*")) == [base]
    assert {file.name: file.stat().st_mtime_ns for file in base.iterdir()} == before


def test_a_study_is_taken_up_where_it_was_cut_off(folder, tmp_path, capsys):
    recipe.run(options(folder, tmp_path, compare=True))
    with pytest.raises(ConfigError, match=r"has a run in it"):
        recipe.run(options(folder, tmp_path, compare=True))
    recipe.run(options(folder, tmp_path, compare=True, seeds=[0, 1], resume_from_checkpoint="last"))
    assert [record["seed"] for record in read_results(tmp_path)["records"]] == [0, 0, 1, 1]
    assert "plain, seed 0: recorded already, skipped" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", ["plain", "sft"])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(folder, tmp_path, trainer):
    more = {"save_strategy": "steps", "save_steps": 2, "trainer": trainer, "bf16": False}
    whole = recipe.run(options(folder, tmp_path, **more))["records"][0]
    (tmp_path / "results.json").unlink()
    shutil.rmtree(tmp_path / "reset-seed0" / "checkpoint-6")
    resumed = recipe.run(options(folder, tmp_path, **more, resume_from_checkpoint="last"))["records"][0]
    for changing in ("train_seconds", "peak_memory_bytes"):
        del whole[changing], resumed[changing]
    assert resumed == whole


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"noise_rat": 0.1}, ConfigError, r"option '--noise_rat=0.1' is not known .*'noise_rate'"),
        ({"packing": True}, ConfigError, r"option '--packing=True' is not known"),
        ({"noise_kind": "typo"}, ConfigError, r"noise_kind.*typo"),
        ({"noise_rate": 2}, ConfigError, r"`rate` is the share of rows"),
        ({"noise_rate": 1, "max_train_samples": 1}, DataError, r"needs at least two rows to change"),
        ({"noise_kind": "wrong_answer"}, DataError, r"only 0 of 24 responses have a final answer"),
        ({"response_column": "absent"}, DataError, r"`column` 'absent' is not in the data set, which has instruction"),
        ({"prompt_column": "absent"}, DataError, r"`prompt_column` is 'absent'"),
        ({"max_seq_length": 3}, DataError, r"prompts have at least `max_seq_length` 3 tokens"),
        ({"max_seq_length": 500}, ConfigError, r"`max_seq_length` is 500, and the model .* has 128 positions"),
        ({"full_finetuning": True}, ScopeError, r"adapters"),
        ({"full_finetuning": True, "reset_scope": "head"}, ScopeError, r"tied"),
        ({"load_in_4bit": True}, ConfigError, r"`load_in_4bit` is True, and there is no CUDA device here"),
        ({"loss": "gce", "reset_loss": "sce"}, ConfigError, "`loss` 'gce' and `reset_loss` 'sce' are the same"),
        ({"max_new_tokens": 0}, ConfigError, "`max_new_tokens` must be at least 1, got 0"),
        ({"loss": "typo"}, ConfigError, r"`loss` must be one of cross_entropy, "),
        (
            {"loss": "gce", "loss_options": "q=1"},
            ConfigError,
            r"`reset_loss_options` must be a JSON object such as .*, got 'q=1'",
        ),
        ({"reset_loss": "gce", "reset_loss_options": '{"q": 3}'}, ConfigError, r"`q` must be in \[0, 1\]"),
        ({"lora_target_modules": "nothing"}, ConfigError, r"`lora_\*` options refused by peft: .*nothing"),
        ({"model_name_or_path": "absent/model"}, ConfigError, r"'absent/model' cannot be loaded"),
        ({"tokenizer_name": "absent/model"}, ConfigError, r"`tokenizer_name` 'absent/model' cannot be loaded"),
        ({"chat_template": "absent.jinja"}, ConfigError, r"`chat_template` 'absent.jinja' cannot be read"),
        ({"train_file": "absent.jsonl"}, DataError, r"`train_file` 'absent.jsonl' is not a file"),
        (
            {"load_best_model_at_end": True, "save_strategy": "best", "metric_for_best_model": "loss"},
            ConfigError,
            r"`load_best_model_at_end` is True",
        ),
        ({"reset_probability": 0, "compare": True}, ConfigError, r"`compare` with `reset_probability` 0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case is for machines without CUDA")
def test_bad_input_is_refused_in_words(folder, tmp_path, more, error, words):
    with pytest.raises(error, match=words):
        recipe.run(options(folder, tmp_path / "out", **more))
    assert not list(tmp_path.rglob("results.json"))


def test_an_encoder_is_refused(folder, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=500, **sizes)).save_pretrained(tmp_path / "bert")
    given = {"model_name_or_path": tmp_path / "bert", "tokenizer_name": folder / "base"}
    with pytest.raises(ConfigError, match=r"is an encoder \(bert\), which reads in both directions"):
        recipe.run(options(folder, tmp_path / "out", **given))


def test_a_tokenizer_that_does_not_belong_is_refused(folder, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300, "bpe")
    tokenizer.add_tokens([f"<extra{n}>" for n in range(200)])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"tokens, and the model .* embeds \d+: they do not belong together"):
        recipe.run(options(folder, tmp_path / "out", tokenizer_name=tmp_path / "other"))


def test_a_tokenizer_without_a_chat_template_needs_one_by_file(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path / "bare")
    given = {"tokenizer_name": tmp_path / "bare", "max_steps": 2}
    with pytest.raises(ConfigError, match=r"has no chat template"):
        recipe.run(options(folder, tmp_path / "out", **given))
    (tmp_path / "chat.jinja").write_text(template)
    recipe.run(options(folder, tmp_path / "out", **given, chat_template=tmp_path / "chat.jinja"))


def test_rows_left_out_and_cut_are_in_the_report(folder, tmp_path):
    rows = [{"prompt": f"Say {text}", "completion": text} for text in TEXTS]
    rows[0]["completion"] = rows[1]["completion"] = ""
    rows[2]["prompt"] = " "
    rows[3]["prompt"] = "long " * 200
    rows[4]["completion"] = "long " * 200
    write(tmp_path / "train.jsonl", rows)
    more = {"train_file": tmp_path / "train.jsonl", "max_train_samples": None, "max_steps": 2, "generation_samples": 0}
    for split in ("validation", "test"):
        write(
            tmp_path / f"{split}.jsonl",
            [{"prompt": f"{split} {row}", "completion": f"It is {row}."} for row in range(8)],
        )
        more[f"{split}_file"] = tmp_path / f"{split}.jsonl"
    recipe.run([word for word in options(folder, tmp_path / "out", **more) if not word.startswith("--max_tr")])
    report = (tmp_path / "out" / "report.md").read_text()
    for sentence in [
        "2 of 90 train rows have no response in 'completion' and were left out.",
        "1 of 90 train rows have an empty prompt and were left out.",
        "prompts leave no room for a response and were left out (`max_seq_length` 64).",
        "responses were cut (`max_seq_length` 64).",
    ]:
        assert sentence in report


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_parse_and_explain_themselves(path):
    from hf_reset.study.options import parse_recipe

    argv = [f"--config={path}", "--use_cpu=true"]
    parsed, training, _ = parse_recipe([recipe.InstructionTuningArguments, recipe.arguments_class(argv)], argv)
    assert training.reset_config().can_reset
    assert parsed.noise_rate == yaml.safe_load(path.read_text()).get("noise_rate", 0.0)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("What:", "Launch:", "Override:", "Takes:", "Expect:"):
        assert any(word in line for line in header)


def test_every_command_of_the_readme_parses():
    from accelerate.commands.launch import launch_command_parser

    from hf_reset.study.options import parse_recipe

    blocks = re.findall(r"```bash\n(.*?)```", (FOLDER / "README.md").read_text(), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if "train.py" in line]
    assert commands
    for command in commands:
        launcher, _, given = command.partition("recipes/instruction_tuning/train.py ")
        assert shlex.split(launcher)[:2] == ["accelerate", "launch"]
        launch_command_parser().parse_args([*shlex.split(launcher)[2:], "train.py"])  # exits on an unknown option
        argv = [*shlex.split(given), "--use_cpu=true"]
        config = argv[argv.index("--config") + 1]
        argv[argv.index("--config") + 1] = str(FOLDER.parents[1] / config)
        parse_recipe([recipe.InstructionTuningArguments, recipe.arguments_class(argv)], argv)


def test_the_tables_of_the_readme_are_those_of_the_result_files():
    """`python tests/readme_tables.py` draws the tables of the package's README; `render` serves both."""
    from readme_tables import render

    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert render(readme) == readme
    assert readme.count("<!-- table:") == readme.count("<!-- end -->") >= 1


def test_help_is_fast_and_names_every_option():
    start = time.perf_counter()
    run = subprocess.run([sys.executable, FOLDER / "train.py", "--help"], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    assert seconds < 20  # a second on an idle machine; importing torch alone takes longer
    assert "import torch" not in run.stderr
    for name in recipe.InstructionTuningArguments.__dataclass_fields__:
        assert f"--{name}" in run.stdout


def test_refusals_end_in_one_line(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^error: `loss` must be one of") as exit_:
        recipe.main(options(folder, tmp_path, loss="typo"))
    assert "\n" not in str(exit_.value)
    assert issubclass(ConfigError, ResetError)


def test_prompts_of_ones_own_data_reach_the_small_llama_but_no_response(tmp_path, monkeypatch):
    seen = []

    def watch(folder, texts, **settings):
        seen.extend(texts)
        raise DataError("seen enough")

    monkeypatch.setattr("hf_reset.corpora.small_llama.small_llama", watch)
    write(tmp_path / "train.jsonl", [{"prompt": f"question {n}", "completion": f"reply {n}"} for n in range(40)])
    more = {"train_file": tmp_path / "train.jsonl", "model_name_or_path": None}
    with pytest.raises(DataError, match="seen enough"):
        recipe.run(options(Path(), tmp_path / "out", **more))
    assert "question 7" in seen
    assert not any("reply" in text and text.startswith("reply") for text in seen)


def test_small_llama_is_whole_or_absent(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fails)
    with pytest.raises(KeyboardInterrupt):
        small_llama(
            tmp_path / "base", TEXTS, hidden_size=32, num_hidden_layers=1, vocab_size=400, steps=1, use_cpu=True
        )
    assert not (tmp_path / "base").exists()


def as_gguf(model, path):
    """Write a Llama's weights as a GGUF file, in float32; queries and keys in the order that its kernels want."""
    from gguf import GGUFWriter

    config, weights = model.config, {name: p.detach() for name, p in model.named_parameters()}
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        **{f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"},
        **{f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")},
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{mine}": f"blk.{layer}.{theirs}" for mine, theirs in parts.items()}
    for name, weight in weights.items():
        theirs = names[name.removesuffix(".weight")]
        if theirs.endswith(("attn_q", "attn_k")):
            count = heads[theirs[-1]]
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_tuned_as_the_model_that_it_is(folder, tmp_path):
    (tmp_path / "packed").mkdir()
    as_gguf(AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path / "packed" / "tiny.gguf")
    named = {"model_name_or_path": tmp_path / "packed", "gguf_file": "tiny.gguf", "tokenizer_name": folder / "base"}
    losses = [
        read_results(out)["records"][0]["history"]["validation_loss"]
        for out, more in ((tmp_path / "own", {}), (tmp_path / "gguf", named))
        if recipe.run(options(folder, out, save_model=False, **more))
    ]
    assert losses[1] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in losses[0]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model_name_or_path": None}, "`gguf_file` 'tiny.gguf' is a file of a model, and none is named"),
        ({"gguf_file": "none.gguf"}, "cannot be loaded"),
    ],
)
def test_a_gguf_file_that_is_not_there_is_refused(folder, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        recipe.run(options(folder, tmp_path, **{"gguf_file": "tiny.gguf", **more}))
