"""The proof that resets are exact, optimizer by optimizer: `python tests/exactness.py` runs it over all that can be
imported, and writes `recipes/results/exactness.json`, from which `python tests/readme_tables.py` draws the table.

The step after a reset equals the step after the anchor, and so do the eleven after that, bit for bit in all weights,
while the learning rate goes on its own way. Proved for a reset that restores the optimizer, for one from a file read
into another run, for one that makes the optimizer fresh, and for one of a part of the weights.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_reset import AnchorStore
from hf_reset.errors import UnsupportedError
from hf_reset.files import write_atomic
from hf_reset.report.environment import environment_record

RESULTS = Path(__file__).parents[1] / "recipes" / "results" / "exactness.json"
BEFORE, EXCURSION, AFTER = range(7), range(100, 108), range(200, 212)


class Net(nn.Module):
    """An embedding, a matrix large enough to be quantised, a norm, biases, and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 64)
        self.hidden = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 3)

    def forward(self, rows):
        return self.head(torch.tanh(self.norm(self.hidden(self.embedding(rows).mean(1)))))


@dataclass(frozen=True)
class Case:
    """An optimizer of a package, made for a model."""

    package: str
    name: str
    make: Callable[[Net], Any]
    is_slow: bool = False

    @property
    def id(self):
        return f"{self.package}-{self.name}"


def seed_all(seed):
    """An optimizer that draws random numbers draws the same again."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Run:
    """A model, its optimizer and its schedule, the same at every call."""

    def __init__(self, make, model=None, ticks=0):
        seed_all(0)
        self.model = Net() if model is None else model
        self.optimizer = make(self.model)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.tick(ticks)

    def tick(self, times):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule moves without the optimizer
            for _ in range(times):
                self.schedule.step()

    def step(self, seed):
        seed_all(seed)
        rows, labels = torch.randint(0, 40, (8, 6)), torch.randint(0, 3, (8,))
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(rows), labels).backward()
        self.optimizer.step()
        self.schedule.step()

    def steps(self, seeds):
        for seed in seeds:
            self.step(seed)
        return self

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def assert_equal_from_here(run, reference):
    """Every step of two runs is the same, in all weights."""
    started = run.weights()
    for seed in AFTER:
        run.step(seed)
        reference.step(seed)
        ours, theirs = run.weights(), reference.weights()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"step {seed - AFTER[0] + 1} after the reset: {name} differs"
    assert not all(torch.equal(started[name], ours[name]) for name in ours), "nothing was trained"


def reference_at_the_anchor(make):
    """A run that stops at the anchor's step, while the schedule goes on as if it had not."""
    reference = Run(make).steps(BEFORE)
    reference.tick(len(EXCURSION))
    return reference


def prove_restore(make):
    """A reset restores the optimizer; storage on the CPU is the same."""
    run = Run(make)
    anchor = AnchorStore(run.model, run.optimizer, storage="cpu")
    run.steps(BEFORE)
    anchor.snapshot()
    run.steps(EXCURSION)
    anchor.restore()
    assert_equal_from_here(run, reference_at_the_anchor(make))


def prove_file(make):
    """The anchor's file, read into a run that was elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(make)
        anchor = AnchorStore(run.model, run.optimizer)
        run.steps(BEFORE)
        anchor.snapshot()
        anchor.save(Path(folder) / "anchor")
        other = Run(make).steps([*EXCURSION, *BEFORE])
        reread = AnchorStore(other.model, other.optimizer)
        reread.load(Path(folder) / "anchor")
    reread.restore()
    assert_equal_from_here(other, reference_at_the_anchor(make))


def prove_zero(make):
    """A reset makes the optimizer as if new at the anchor's weights."""
    run = Run(make)
    anchor = AnchorStore(run.model, run.optimizer, optimizer_state="zero")
    run.steps(BEFORE)
    anchor.snapshot()
    run.steps(EXCURSION)
    anchor.restore()
    stopped = Run(make).steps(BEFORE)
    for p in stopped.model.parameters():
        p.grad = None
        p._post_accumulate_grad_hooks = None  # of the optimizer that is left behind
    assert_equal_from_here(run, Run(make, stopped.model, ticks=len(BEFORE) + len(EXCURSION)))


def prove_part(make):
    """A part goes back, weights and what the optimizer remembers of them; the rest and what is shared stays."""
    run = Run(make)
    part, whole = AnchorStore(run.model, run.optimizer, scope=r"^hidden\."), AnchorStore(run.model, run.optimizer)
    run.steps(BEFORE)
    part.snapshot()
    whole.snapshot()
    then = held(whole)
    run.steps(EXCURSION)
    whole.snapshot()
    now = held(whole)
    part.restore()
    whole.snapshot()
    after = held(whole)
    moved = 0
    for key in then.keys() | now.keys():
        expected = (then if key.name.startswith("hidden.") else now).get(key)
        assert (key in after) == (expected is not None), f"{key} came or went"
        if expected is not None:
            assert torch.equal(expected, after[key]), f"{key} is not what it should be"
            moved += key in now and not torch.equal(expected, now[key])
    assert moved, "nothing went back"
    run.steps(AFTER)


def held(anchor):
    """Copies of all that an anchor holds, by key."""
    return {key: tensor.clone() for key, tensor in anchor._copy.held.items()}


PROOFS = {"restore": prove_restore, "file": prove_file, "zero": prove_zero, "part": prove_part}


def outcome(proof, make):
    """ "exact", or the words it was refused in."""
    try:
        proof(make)
    except UnsupportedError as error:
        return f"refused: {error}"
    return "exact"


def load(package, name):
    return getattr(importlib.import_module(package), name)


def plain(package, name, label=None, **options):
    """An optimizer that takes parameters and numbers."""

    def make(model):
        return load(package, name)(model.parameters(), **{"lr": 1e-3, **options})

    return Case(package.partition(".")[0], label or name, make)


def low_rank(package, name, *, layerwise=False, **more):
    """GaLore and APOLLO as Trainer sets them up: a projection for matrices, none for the rest."""
    group = {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    if package == "apollo_torch":
        group |= {"proj": "random", "scale_type": "channel"}

    def make(model):
        cls = load(package, name)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        if not layerwise:
            return cls([{"params": others}, {"params": matrices, **group}], lr=1e-3, **more)
        return LayerWiseDummyOptimizer(optimizer_dict=_layerwise(cls, matrices, others, group, more), lr=1e-3)

    return Case(package, f"{name} layerwise" if layerwise else name, make)


def _layerwise(cls, matrices, others, group, more):
    each = {p: cls([{"params": [p], **group}], lr=1e-3, **more) for p in matrices}
    each |= {p: cls([p], lr=1e-3, **more) for p in others}

    def hook(p):
        if p.grad is not None:
            each[p].step()
            each[p].zero_grad()

    for p in each:
        p.register_post_accumulate_grad_hook(hook)
    return each


def lookahead(inner_name):
    def make(model):
        package = importlib.import_module("pytorch_optimizer")
        return package.Lookahead(getattr(package, inner_name)(model.parameters(), lr=1e-3))

    return Case("pytorch_optimizer", f"Lookahead({inner_name})", make)


TORCH = "Adam AdamW NAdam RAdam Adamax Adadelta Adagrad RMSprop Rprop ASGD Adafactor"
OPTIMI = "Adam AdamW Adan RAdam Ranger StableAdamW Lion SGD"
PYTORCH_OPTIMIZER = (
    "AdamP RAdam AdaBelief Adan SOAP StableAdamW AdEMAMix LaProp ADOPT "
    "Adai AdaBound AdaNorm Amos AvaGrad CAME Fromage GaLore Lamb Lion MARS NovoGrad PNM QHAdam "
    "SRMM Tiger Yogi ASGD ScheduleFreeAdamW SPlus"
)
BITSANDBYTES = "AdamW8bit Lion8bit AdEMAMix8bit RMSprop8bit AdamW PagedAdamW8bit"
DADAPTATION = "DAdaptAdam DAdaptSGD DAdaptAdaGrad DAdaptLion DAdaptAdan"
TORCH_OPTIMIZER = "AdaBound AdaMod AggMo Apollo DiffGrad Lamb MADGRAD NovoGrad QHAdam RangerQH Shampoo Yogi"

CASES = [
    plain("torch.optim", "SGD", momentum=0.9),
    *[plain("torch.optim", name) for name in TORCH.split()],
    plain("torch.optim", "AdamW", "AdamW (amsgrad, foreach)", amsgrad=True, foreach=True),
    plain("transformers", "Adafactor", relative_step=False, scale_parameter=False),
    plain("schedulefree", "AdamWScheduleFree"),
    *[plain("optimi", name) for name in OPTIMI.split()],
    plain("prodigyopt", "Prodigy", lr=1.0),
    plain("prodigyopt", "Prodigy", "Prodigy (safeguard, slices)", lr=1.0, safeguard_warmup=True, slice_p=11),
    *[plain("pytorch_optimizer", name) for name in PYTORCH_OPTIMIZER.split()],
    plain("pytorch_optimizer", "Ranger21", num_iterations=100),
    replace(plain("pytorch_optimizer", "Kron"), is_slow=True),
    lookahead("AdamP"),
    plain("grokadamw", "GrokAdamW"),
    low_rank("galore_torch", "GaLoreAdamW"),
    low_rank("galore_torch", "GaLoreAdafactor", scale_parameter=False, relative_step=False),
    low_rank("galore_torch", "GaLoreAdamW", layerwise=True),
    low_rank("apollo_torch", "APOLLOAdamW"),
    low_rank("apollo_torch", "APOLLOAdamW", layerwise=True),
    plain("torchao.optim", "AdamW8bit"),
    plain("torchao.optim", "AdamW4bit"),
    *[plain("bitsandbytes.optim", name) for name in BITSANDBYTES.split()],
    *[plain("dadaptation", name, lr=1.0) for name in DADAPTATION.split()],
    *[plain("torch_optimizer", name) for name in TORCH_OPTIMIZER.split()],
]


def version(package):
    """The version of a package, by the name it is imported under."""
    names = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(names[0])


def main() -> None:
    """Prove what can be imported, and write the result file; an inexact case ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help="those to prove anew, where the file has the others already")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = json.loads(options.results.read_text(encoding="utf-8"))["optimizers"] if options.packages else []
    records = {f"{record['package']}-{record['name']}": record for record in known}
    for case in CASES:
        if not options.packages or case.package in options.packages:
            found = {name: outcome(proof, case.make) for name, proof in PROOFS.items()}
            records[case.id] = {"package": case.package, "version": version(case.package), "name": case.name, **found}
            print(case.id, *(f"{name}: {words}" for name, words in found.items()), sep="  ", flush=True)
    result = {
        "benchmark": "exactness",
        "configuration": {"steps_before": len(BEFORE), "excursion": len(EXCURSION), "steps_compared": len(AFTER)},
        "environment": environment_record(torch.device("cpu")),
        "proofs": {name: " ".join((proof.__doc__ or "").split()) for name, proof in PROOFS.items()},
        "optimizers": [records[case.id] for case in CASES if case.id in records],
    }
    write_atomic(options.results, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
