# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes,trl]"]
# ///
"""A reset and a snapshot, against copying the same bytes, and against what others do to go back or to average.

    python recipes/benchmarks/resets.py                                          # four sizes on CPU, some minutes
    python recipes/benchmarks/resets.py --sizes 128x2 768x12 1024x24 --dtypes bfloat16 # on a GPU with room

For each model size (width x layers of a BERT), type and scope, in another random order each round:

- `reset`, `snapshot`: `AnchorStore` with the optimizer's state;
- `copy`: one bare fused copy of what the anchor holds to where a reset puts it, as fast as torch can move these bytes;
- `load_state_dict`: model and optimizer back from a deep copy of their states, the way of the paper's code;
- `reload`: the same from a checkpoint on disk, the way of `load_best_model_at_end`;
- `bema`: an update of TRL's BEMACallback, an average of the weights;
- `average`: an update of this package's own (`ema_decay`).

The last four know no scope and are measured with "all", on a model and an optimizer of their own: a state that was
loaded lies elsewhere, which no run with resets meets. Seconds are medians over rounds with the fastest and the
slowest; ratios are taken within a round. Also: what the anchor holds, what memory grows by from the second snapshot
on, resets early and late in a long row, a copy of 256 MiB for the machine's bandwidth, and the time of the import.

Writes recipes/results/benchmarks/resets_<device>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_reset import AnchorStore

SCOPES = ("all", "last:1", "head", "adapters")
IMPORTS = {
    "from transformers import Trainer": "from transformers import Trainer",
    "import hf_reset": "import hf_reset; hf_reset.ResetTrainer",
}


def main() -> None:
    """Measure, print a table, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["128x2", "256x4", "384x6", "768x12"], metavar="WIDTHxLAYERS")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "benchmarks")
    options = parser.parse_args()

    import torch
    from rich.progress import track

    from hf_reset.files import write_atomic
    from hf_reset.report.environment import environment_record

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [(size, dtype, scope) for size in options.sizes for dtype in options.dtypes for scope in SCOPES]
    done = [measure(*case, options.rounds, device) for case in track(cases, "cases", disable=not sys.stderr.isatty())]
    result = {
        "benchmark": "resets",
        "configuration": {key: value for key, value in vars(options).items() if key != "results"},
        "environment": environment_record(device),
        "bandwidth_gb_per_s": bandwidth(device),
        "imports": imports(options.rounds),
        "cases": done,
    }
    file = options.results / f"resets_{device.type}.json"
    write_atomic(file, json.dumps(result, indent=1) + "\n")
    for case in done:
        shown = {name: f"{1000 * case['seconds'][name]['median']:.2f} ms" for name in case["seconds"]}
        print(f"{case['size']:>8} {case['dtype']:<9}{case['scope']:<9} {case['anchor_bytes']:>13,} bytes  {shown}")


def measure(size: str, dtype: str, scope: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """One case: seconds of each way, and the ratios of the same round."""
    import torch

    from hf_reset import AnchorStore

    made = partial(model_of, size, getattr(torch, dtype), device, adapters=scope == "adapters")
    model, optimizer = made()
    anchor = AnchorStore(model, optimizer, scope=scope)
    anchor.snapshot()
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_of(anchor) | (rivals_of(*made(), folder) if scope == "all" else {})
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()  # what is made at the first call is made once
        for turn in range(rounds):
            for name in random.Random(turn).sample(list(ways), len(ways)):
                seconds[name].append(timed(ways[name], device))
    return {
        "size": size,
        "dtype": dtype,
        "scope": scope,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": len(list(model.parameters())),
        "scope_bytes": sum(p.numel() * p.element_size() for p in anchor._views.parameters.values()),
        "anchor_bytes": anchor.nbytes,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "to_copy": {
            name: spread([mine / base for mine, base in zip(values, seconds["copy"], strict=True)])
            for name, values in seconds.items()
        },
        "grows_by_bytes": growth(anchor, device),
        "late_to_early": drift(anchor, device),
    }


def model_of(
    size: str, dtype: torch.dtype, device: torch.device, *, adapters: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A BERT classifier with an AdamW that has made a step."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    width, layers = (int(part) for part in size.split("x"))
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32, intermediate_size=4 * width
    )
    torch.manual_seed(0)
    model = cast("nn.Module", BertForSequenceClassification(config))
    model.to(device, dtype)
    if adapters:
        from peft import LoraConfig, TaskType, get_peft_model

        model = get_peft_model(model, LoraConfig(TaskType.SEQ_CLS, r=8, target_modules="all-linear"))  # pyright: ignore[reportArgumentType]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return model, optimizer


def ways_of(anchor: AnchorStore) -> dict[str, Callable[[], object]]:
    """The anchor's verbs, and one bare fused copy of the tensors that it holds."""
    import torch

    groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, held in anchor._copy.pairs(anchor._live()):
        targets, sources = groups.setdefault(held.dtype, ([], []))
        targets.append(target)
        sources.append(held)

    def bare() -> None:
        for targets, sources in groups.values():
            torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]

    return {"copy": bare, "reset": anchor.restore, "snapshot": anchor.snapshot}


def rivals_of(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> dict[str, Callable[[], object]]:
    """What others do: states from a deep copy, states from a file, averages of the weights."""
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from trl.trainer.callbacks import BEMACallback

    from hf_reset.anchor.copies import Copy, LiveViews

    kept = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    file = Path(folder) / "checkpoint.pt"
    torch.save(kept, file)
    args, state, control = TrainingArguments(folder), TrainerState(), TrainerControl()
    bema = BEMACallback(update_freq=1, device=str(next(model.parameters()).device))
    bema.on_train_begin(args, state, control, model=model)  # pyright: ignore[reportArgumentType]
    views, average = LiveViews(model), Copy(least=torch.float32)
    average.take(views.weights())

    def put_back(states: Mapping[str, object] | tuple[dict[str, torch.Tensor], dict[str, object]]) -> None:
        weights, moments = states
        model.load_state_dict(weights)  # pyright: ignore[reportArgumentType]
        optimizer.load_state_dict(copy.deepcopy(moments))  # pyright: ignore[reportArgumentType]

    return {
        "load_state_dict": lambda: put_back(kept),
        "reload": lambda: put_back(torch.load(file, weights_only=True)),
        "bema": lambda: torch.no_grad()(bema._update_bema_weights)(100),
        "average": lambda: average.lerp(views.weights(), 0.02),
    }


def timed(way: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, to the device's end."""
    synchronize(device)
    start = time.perf_counter()
    way()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a device that works beside the host."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def growth(anchor: AnchorStore, device: torch.device) -> int:
    """By how much memory grows over ten further snapshots and resets; on the CPU in pages of the process."""
    import torch

    def taken() -> int:
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device)
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096

    before = taken()
    for _ in range(10):
        anchor.snapshot()
        anchor.restore()
    return taken() - before


def drift(anchor: AnchorStore, device: torch.device, calls: int = 60) -> float:
    """Median of the last third of many resets, to that of the first: whether a long run pays more."""
    seconds = [timed(anchor.restore, device) for _ in range(calls)]
    return statistics.median(seconds[-calls // 3 :]) / statistics.median(seconds[: calls // 3])


def bandwidth(device: torch.device) -> float:
    """Bytes read and written by a plain copy of 256 MiB, a second, in 10⁹."""
    import torch

    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(7)]
    return 2 * source.numel() / statistics.median(seconds) / 1e9


def imports(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a new process that imports this package, and of one that imports Trainer."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds + 1):
        for name, code in IMPORTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds[name].append(time.perf_counter() - start)
    return {name: spread(values[1:]) for name, values in seconds.items()}  # the first fills the disk's cache


if __name__ == "__main__":
    main()
