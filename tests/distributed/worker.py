"""What the scripts that run in several processes share: patches for the CPU, checks, and whole weights."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_reset.anchor.ranks import end_process_group
from hf_reset.anchor.scopes import named_parameters, unwrapped
from hf_reset.errors import ResetError

RANK = int(os.environ.get("RANK", "0"))


def fsdp_on_cpu() -> None:
    """Test-only: accelerate turns to FSDP only on accelerators (state.py, `AcceleratorState.__init__`)."""
    import accelerate.state as state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin

    state.AcceleratorState.__init__ = patched


def fsdp1_on_cpu() -> None:
    """Test-only, after `fsdp_on_cpu`: FSDP1 takes "cpu:0" for another device than "cpu", and "copies" state dicts
    to the CPU, which on a CPU leaves them in memory that it frees or gathers into again."""
    import torch.distributed.fsdp._init_utils as init
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig

    original = init._get_device_from_device_id
    init._get_device_from_device_id = lambda device, *args: (
        torch.device("cpu") if torch.device(device).type == "cpu" else original(device, *args)
    )
    for config in (FullStateDictConfig, FullOptimStateDictConfig):
        config.offload_to_cpu = property(lambda self: False, lambda self, value: None)


def deepspeed_on_cpu() -> None:
    """Test-only: without an accelerator, accelerate's state does not start DeepSpeed's processes."""
    import accelerate.state as state
    import transformers.training_args as training_args
    from accelerate.utils import DistributedType

    original = state.PartialState._prepare_backend

    def backend(self, *args, **kwargs):
        name, kind = original(self, *args, **kwargs)
        return ("gloo", DistributedType.MULTI_GPU) if name is None else (name, kind)

    state.PartialState._prepare_backend = backend
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    for name in ("is_torch_bf16_gpu_available", "is_torch_bf16_available_on_device"):
        if hasattr(training_args, name):
            setattr(training_args, name, lambda *args, **kwargs: True)


FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}

FSDP1 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 1,
        "use_orig_params": True,
        "sync_module_states": False,
        "cpu_ram_efficient_loading": False,
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    },
}


def fresh_state() -> None:
    """Let the next Trainer choose its engine anew; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)


def whole(model) -> dict[str, torch.Tensor]:
    """The whole weights that the next forward reads, on every rank (a collective where they are sharded)."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: p.detach().clone() for name, p in named_parameters(unwrapped(model)).items()}
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


class Weights(TrainerCallback):
    """Whole weights after each step and at each evaluation."""

    def __init__(self):
        self.after_step, self.evaluated = {}, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.after_step[state.global_step] = whole(kwargs["model"])

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.evaluated[state.global_step] = (metrics.get("eval_loss"), whole(kwargs["model"]))


class Counted(TrainerCallback):
    """Collective operations issued in each step, from its first forward to after its update and reset."""

    def __init__(self):
        self.steps, self._profile = {}, None

    def on_step_begin(self, args, state, control, **kwargs):
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        self._profile.stop()
        names = [event.name for event in self._profile.events() if event.name.startswith("c10d::")]
        self.steps[state.global_step - 1] = dict(Counter(names))


def trail(trainer):
    return [(event["kind"], event["step"], event["metric"]) for event in trainer.reset_callback.events]


def raised(action) -> dict:
    """The error of this rank, and what the other saw is in its own file."""
    try:
        action()
    except ResetError as error:
        return {"kind": type(error).__name__, "text": str(error)}
    return {"kind": None}


def run_checks(checks: dict[str, Callable[[Path], Any]]) -> None:
    """Run each check in a folder of its own, and write what they return (or their traceback) for pytest.

    Names on the command line, after the folder, choose among them.
    """
    faulthandler.enable()
    faulthandler.dump_traceback_later(float(os.environ.get("CHECK_SECONDS", "300")), exit=True)  # say where it hangs
    folder, chosen = Path(sys.argv[1]), sys.argv[2:] or list(checks)
    found = {}
    for name in chosen:
        try:
            found[name] = checks[name](folder / name)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
            print(f"rank {RANK}, check {name}:\n{found[name]['error']}", file=sys.stderr, flush=True)
    torch.save(found, folder / f"rank{RANK}.pt")
    end_process_group()
