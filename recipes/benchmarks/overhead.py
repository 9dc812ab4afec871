# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes]"]
# ///
"""What resetting costs, as ratios against the stock Trainer in the same run.

Each round trains every arm once, in an order that changes from round to round, and a ratio compares the median
step of an arm with the stock median of the same round. Where steps of one arm vary by more than that from round to
round, the time inside the callback's own hooks says it better: resets, snapshots and decisions, a step on average,
in units of a stock step. Beside it, the time of one snapshot and of one reset, and the bytes that the anchor holds;
what a row memory, which the trainer arm has, adds to a step; and what each diagnostic takes in its hooks.

    python recipes/benchmarks/overhead.py                                # 6-layer BERT on CPU, about 5 minutes
    python recipes/benchmarks/overhead.py --hidden_size 768 --layers 12  # BERT-base, for a GPU

Writes recipes/results/benchmarks/overhead_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import TrainerCallback, TrainingArguments

ARMS = ("stock", "callback_off", "callback", "trainer")
DIAGNOSTICS = ("GradientPartsCallback", "LabelMemoryCallback", "ExcursionDiffusionCallback")  # by their defaults


def main() -> None:
    """Measure, print a table, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens a row")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--probability", type=float, default=0.02)
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "benchmarks")
    options = parser.parse_args()

    import torch

    from hf_reset.files import write_atomic
    from hf_reset.report.environment import environment_record

    medians: dict[str, list[float]] = {arm: [] for arm in ARMS}
    hooks: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(options.rounds):
        for arm in ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]:
            seconds, in_hooks = step_seconds(arm, options)
            medians[arm].append(statistics.median(seconds))
            hooks[arm].append(in_hooks)
            print(f"round {turn + 1}/{options.rounds}  {arm:<14}{1000 * medians[arm][-1]:8.2f} ms a step", flush=True)
    stock = statistics.median(medians["stock"])
    ratios = {arm: [mine / base for mine, base in zip(medians[arm], medians["stock"], strict=True)] for arm in ARMS[1:]}
    costs = {scope: anchor_costs(scope, options, stock) for scope in ("all", "last:2", "head")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "benchmark": "overhead",
        "configuration": {key: value for key, value in vars(options).items() if key != "results"},
        "environment": environment_record(device),
        "stock_step_ms": 1000 * stock,
        "step_ratio_to_stock": {
            arm: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for arm, values in ratios.items()
        },
        "hooks_in_stock_steps": {arm: statistics.median(hooks[arm]) / stock for arm in ARMS[1:]},
        "anchor": costs,
        "row_memory": (remembering := memory_costs(options, stock)),
        "diagnostics_steps": {name: diagnostic_cost(name, options) / stock for name in DIAGNOSTICS},
    }
    file = options.results / f"overhead_{device.type}.json"
    write_atomic(file, json.dumps(result, indent=2) + "\n")
    for arm, values in ratios.items():
        share = f"hooks {result['hooks_in_stock_steps'][arm]:.5f}"
        print(f"{arm:<14} {statistics.median(values):.3f} of stock ({min(values):.3f} to {max(values):.3f}), {share}")
    print(
        f"row memory {remembering['memory_bytes']:>10,} bytes; of a stock step: numbering "
        f"{remembering['numbering_steps']:.4f}, visit and share {remembering['visit_and_share_steps']:.4f}"
    )
    for name, share in result["diagnostics_steps"].items():
        print(f"{name} {share:.4f} of a stock step, on average over the steps")
    for scope, cost in costs.items():
        print(
            f"{scope:<8} anchor {cost['anchor_bytes']:>12,} bytes; in stock steps: snapshot "
            f"{cost['snapshot_steps']:.3f}, restore {cost['restore_steps']:.3f}, distance {cost['distance_steps']:.3f}"
        )


def model_of(options: argparse.Namespace) -> nn.Module:
    """A BERT of the asked size, without dropout so that every arm computes the same."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30_522,
            hidden_size=options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden_size // 32,
            intermediate_size=4 * options.hidden_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=8,  # pyright: ignore[reportCallIssue]
        )
    )


def rows_of(options: argparse.Namespace) -> Dataset:
    """Training rows enough for all steps."""
    import torch
    from datasets import Dataset

    torch.manual_seed(0)
    count = options.batch_size * options.steps
    ids = torch.randint(1, 30_000, (count, options.length))
    labels = [row % 8 for row in range(count)]
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels}
    )


def arguments_of(directory: str, options: argparse.Namespace) -> TrainingArguments:
    """A run of the asked length with an evaluation every 20 steps, and no output."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=directory,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        eval_strategy="steps",
        eval_steps=20,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def synchronize() -> None:
    """Wait for a device that works beside the host."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class HookClock:
    """Adds up the seconds in some hooks of a callback."""

    def __init__(self, callback: TrainerCallback, *hooks: str) -> None:
        self.seconds = 0.0
        for hook in hooks:
            setattr(callback, hook, self._timed(getattr(callback, hook)))

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            synchronize()
            start = time.perf_counter()
            hook(*args, **kwargs)
            synchronize()
            self.seconds += time.perf_counter() - start

        return run


def step_seconds(arm: str, options: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of each step of one run, evaluations and the first five steps left out; and of the hooks, a step."""
    from transformers import Trainer, TrainerCallback

    from hf_reset import ResetTrainer, StochasticResetCallback

    class Clock(TrainerCallback):
        """Times from one step's begin to its end."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    rows = rows_of(options)
    clock = Clock()
    reset = {
        "callback_off": StochasticResetCallback(probability=0.0, finish="last"),
        "callback": StochasticResetCallback(probability=options.probability, patience=0),
        "trainer": StochasticResetCallback(probability=options.probability, patience=0),
    }.get(arm)
    in_hooks = None if reset is None else HookClock(reset, "on_step_begin", "on_optimizer_step", "on_evaluate")
    with tempfile.TemporaryDirectory() as directory:
        trainer = (ResetTrainer if arm == "trainer" else Trainer)(
            model_of(options),
            arguments_of(directory, options),
            train_dataset=rows,
            eval_dataset=rows.select(range(2 * options.batch_size)),
            callbacks=[clock, *([reset] if reset else [])],
        )
        trainer.train()
    return clock.seconds[5:], in_hooks.seconds / options.steps if in_hooks else 0.0


def anchor_costs(scope: str, options: argparse.Namespace, stock: float) -> dict[str, float]:
    """Bytes of one scope's anchor, and its verbs in units of a stock step."""
    import torch

    from hf_reset import AnchorStore

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(options).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    anchor = AnchorStore(model, optimizer, scope=scope)
    anchor.snapshot()

    def steps(verb: Any) -> float:
        seconds = []
        for _ in range(7):
            synchronize()
            start = time.perf_counter()
            verb()
            synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) / stock

    return {
        "anchor_bytes": anchor.nbytes,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "snapshot_steps": steps(anchor.snapshot),
        "restore_steps": steps(anchor.restore),
        "distance_steps": steps(anchor.distance),
    }


def diagnostic_cost(name: str, options: argparse.Namespace) -> float:
    """Seconds in the hooks of a diagnostic callback, a step on average over a run with resets."""
    from transformers import Trainer

    from hf_reset import StochasticResetCallback, diagnostics

    rows = rows_of(options)
    clean = [(row + (row % 5 == 0)) % 8 for row in range(len(rows))]
    noisy = rows.add_column("is_mislabelled", [row % 5 == 0 for row in range(len(rows))])  # pyright: ignore[reportCallIssue]
    noisy = noisy.add_column("clean_label", clean)
    kind: Any = getattr(diagnostics, name)
    measured = kind() if name == "ExcursionDiffusionCallback" else kind(noisy)
    in_hooks = HookClock(measured, "on_step_end", "on_evaluate")
    resets = StochasticResetCallback(probability=options.probability, patience=0)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model_of(options),
            arguments_of(directory, options),
            train_dataset=rows,
            eval_dataset=rows.select(range(2 * options.batch_size)),
            callbacks=[resets, measured],
        )
        trainer.train()
    return in_hooks.seconds / options.steps


def memory_costs(options: argparse.Namespace, stock: float, classes: int = 8) -> dict[str, float]:
    """What a row memory adds to each step, in units of a stock step: numbers in the loader, a visit, its share."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from hf_reset.rows import RowMemory
    from hf_reset.rows.identity import NumberedRows, NumberingCollator

    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, size = options.batch_size * options.steps, options.batch_size
    rows = [{"input_ids": torch.zeros(options.length, dtype=torch.long), "labels": 0} for _ in range(count)]
    plain = DataLoader(rows, size, collate_fn=default_data_collator)  # pyright: ignore[reportArgumentType]
    numbered = DataLoader(NumberedRows(rows), size, collate_fn=NumberingCollator(default_data_collator))
    logits = torch.randn(size, classes, device=device)
    labels = torch.zeros(size, dtype=torch.long, device=device)
    batches = [torch.arange(first, first + size, device=device) for first in range(0, count, size)]
    memory = RowMemory(count, classes)

    def steps(verb: Callable[[], Any]) -> float:
        """Of one epoch, a step."""
        seconds = []
        for _ in range(7):
            start = time.process_time()
            verb()
            synchronize()
            seconds.append(time.process_time() - start)
        return statistics.median(seconds) / options.steps / stock

    def visits() -> None:
        for batch in batches:
            memory.update(batch, logits, labels)

    def visits_and_share() -> None:
        visits()
        memory.share()

    return {
        "memory_bytes": memory.nbytes,
        "numbering_steps": steps(lambda: list(numbered)) - steps(lambda: list(plain)),
        "visit_and_share_steps": steps(visits_and_share),
    }


if __name__ == "__main__":
    main()
