"""The proof that resets are exact, by optimizer and by PEFT method.

`python tests/exactness.py` runs it over all that can be imported, and writes `recipes/results/exactness.json`, from
which `python tests/readme_tables.py` draws the table.

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
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import bert
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
    """What is proved to be exact: an optimizer of a package, or a method of PEFT.

    Attributes:
        package: the package, by the name it is imported under.
        name: its row in the table.
        make: the optimizer for a model.
        build: the model.
        part: a regular expression for the part of the weights that goes back alone.
        is_slow: whether it takes too long for CI.
    """

    package: str
    name: str
    make: Callable[[nn.Module], Any]
    build: Callable[[], nn.Module] = Net
    part: str = r"^hidden\."
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

    def __init__(self, case, model=None, ticks=0):
        seed_all(0)
        self.model = case.build() if model is None else model
        self.optimizer = case.make(self.model)
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
        output = self.model(rows)
        nn.functional.cross_entropy(getattr(output, "logits", output), labels).backward()
        self.optimizer.step()
        self.schedule.step()

    def steps(self, seeds):
        for seed in seeds:
            self.step(seed)
        return self

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


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


def reference_at_the_anchor(case):
    """A run that stops at the anchor's step, while the schedule goes on as if it had not."""
    reference = Run(case).steps(BEFORE)
    reference.tick(len(EXCURSION))
    return reference


def prove_restore(case):
    """A reset restores the optimizer; storage on the CPU is the same."""
    run = Run(case)
    anchor = AnchorStore(run.model, run.optimizer, storage="cpu")
    run.steps(BEFORE)
    anchor.snapshot()
    run.steps(EXCURSION)
    anchor.restore()
    assert_equal_from_here(run, reference_at_the_anchor(case))


def prove_file(case):
    """The anchor's file, read into a run that was elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(case)
        anchor = AnchorStore(run.model, run.optimizer)
        run.steps(BEFORE)
        anchor.snapshot()
        anchor.save(Path(folder) / "anchor")
        other = Run(case).steps([*EXCURSION, *BEFORE])
        reread = AnchorStore(other.model, other.optimizer)
        reread.load(Path(folder) / "anchor")
    reread.restore()
    assert_equal_from_here(other, reference_at_the_anchor(case))


def prove_zero(case):
    """A reset makes the optimizer as if new at the anchor's weights."""
    run = Run(case)
    anchor = AnchorStore(run.model, run.optimizer, optimizer_state="zero")
    run.steps(BEFORE)
    anchor.snapshot()
    run.steps(EXCURSION)
    anchor.restore()
    stopped = Run(case).steps(BEFORE)
    for p in stopped.model.parameters():
        p.grad = None
        p._post_accumulate_grad_hooks = None  # of the optimizer that is left behind
    assert_equal_from_here(run, Run(case, stopped.model, ticks=len(BEFORE) + len(EXCURSION)))


def prove_part(case):
    """A part goes back, weights and what the optimizer remembers of them; the rest and what is shared stays."""
    run = Run(case)
    part, whole = AnchorStore(run.model, run.optimizer, scope=case.part), AnchorStore(run.model, run.optimizer)
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
        expected = (then if re.search(case.part, key.name) else now).get(key)
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


def outcome(proof, case):
    """ "exact", or the words it was refused in."""
    try:
        proof(case)
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


def peft(name, cls=None, **options):
    """A method of PEFT on a small BERT: adapters, and the classifier that PEFT trains beside them."""

    def build():
        import peft

        config = getattr(peft, f"{cls or name}Config")(task_type="SEQ_CLS", **options)
        return peft.get_peft_model(bert(), config)

    def make(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    return Case("peft", name, make, build, part=r"classifier")


LAYERS = {"target_modules": ["query", "value"]}
PEFT = [
    peft("LoRA", "Lora", r=2, **LAYERS),
    peft("LoRA with dropout", "Lora", r=2, lora_dropout=0.1, **LAYERS),
    peft("rsLoRA", "Lora", r=2, use_rslora=True, **LAYERS),
    peft("DoRA", "Lora", r=2, use_dora=True, **LAYERS),
    peft("PiSSA", "Lora", r=2, init_lora_weights="pissa", **LAYERS),
    peft("AdaLoRA", "AdaLora", init_r=4, target_r=2, total_step=30, tinit=5, tfinal=5, **LAYERS),
    peft("IA3", feedforward_modules=["value"], **LAYERS),
    peft("OFT", oft_block_size=4, **LAYERS),
    peft("OFT (coft)", "OFT", oft_block_size=4, coft=True, **LAYERS),
    peft("BOFT", boft_block_size=4, **LAYERS),
    peft("VeRA", "Vera", r=4, **LAYERS),
    peft("LoHa", r=2, **LAYERS),
    peft("LoKr", r=2, **LAYERS),
    peft("FourierFT", n_frequency=8, **LAYERS),
    peft("VB-LoRA", "VBLoRA", r=2, num_vectors=8, vector_length=4, **LAYERS),
    peft("HRA", r=2, **LAYERS),
    peft("RandLoRA", "RandLora", r=4, **LAYERS),
    peft("SHiRA", "Shira", r=2, **LAYERS),
    peft("MiSS", "Miss", r=2, **LAYERS),
    peft("LN tuning", "LNTuning", target_modules=["LayerNorm"]),
    peft("LoRA with trainable tokens", "Lora", r=2, trainable_token_indices=[1, 2, 3], **LAYERS),
    peft("prompt tuning", "PromptTuning", num_virtual_tokens=3),
    peft("P-tuning", "PromptEncoder", num_virtual_tokens=3, encoder_hidden_size=8),
    peft("prefix tuning", "PrefixTuning", num_virtual_tokens=3),
]

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
    *PEFT,
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
    known = json.loads(options.results.read_text(encoding="utf-8"))["cases"] if options.packages else []
    records = {f"{record['package']}-{record['name']}": record for record in known}
    for case in CASES:
        if not options.packages or case.package in options.packages:
            found = {name: outcome(proof, case) for name, proof in PROOFS.items()}
            records[case.id] = {"package": case.package, "version": version(case.package), "name": case.name, **found}
            print(case.id, *(f"{name}: {words}" for name, words in found.items()), sep="  ", flush=True)
    result = {
        "benchmark": "exactness",
        "configuration": {"steps_before": len(BEFORE), "excursion": len(EXCURSION), "steps_compared": len(AFTER)},
        "environment": environment_record(torch.device("cpu")),
        "proofs": {name: " ".join((proof.__doc__ or "").split()) for name, proof in PROOFS.items()},
        "cases": [records[case.id] for case in CASES if case.id in records],
    }
    write_atomic(options.results, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
