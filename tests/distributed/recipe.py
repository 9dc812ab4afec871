"""Run by torchrun: a recipe under an accelerate configuration, as `accelerate launch --config_file` would, on CPU.

    recipe.py CONFIG TRAIN_SCRIPT [options of the recipe]

accelerate's launcher starts one process only on a CPU; here torchrun starts them, and the environment that the
launcher would have given them is taken from the launcher's own functions.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import sys

import torch
from worker import deepspeed_on_cpu, fsdp1_on_cpu, fsdp_on_cpu


def launcher_environment(config: str, *options: str) -> dict[str, str]:
    """What `accelerate launch --config_file CONFIG` puts into the environment of its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    parsed = launch_command_parser().parse_args(["--config_file", config, *options, "train.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(parsed)[1]
    if parsed.multi_gpu or parsed.use_fsdp:
        return prepare_multi_gpu_env(parsed)
    return prepare_simple_launcher_cmd_env(parsed)[1]


if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.dump_traceback_later(float(os.environ.get("CHECK_SECONDS", "300")), exit=True)  # say where it hangs
    config, script, *options = sys.argv[1:]
    mine = launcher_environment(config, "--mixed_precision", "no")
    os.environ.update({key: value for key, value in mine.items() if key.startswith(("ACCELERATE_", "FSDP_"))})
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        deepspeed_on_cpu()
    else:
        fsdp_on_cpu()
        if os.environ.get("FSDP_VERSION") == "1":
            fsdp1_on_cpu()
        options += ["--use_cpu", "true"]
    torch.set_num_threads(1)
    sys.argv = [script, *options]
    runpy.run_path(script, run_name="__main__")
