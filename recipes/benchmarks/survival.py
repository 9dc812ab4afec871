# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes]"]
# ///
"""Kill training at random moments with SIGKILL, resume it, and see whether it ends bit-identical.

A life is one run that saves at every step, killed three times and resumed each time, in one process, under DDP
on two, or under FSDP2 on two. A kill waits for a step, an evaluation, a checkpoint write or an anchor write to
begin, then for a random instant, and takes one rank or all. At its end the life's weights, optimizer state,
anchor, audit trail and random state must equal those of a run that was left alone.

    python recipes/benchmarks/survival.py                         # 60 kills, about 8 minutes on two CPU cores
    python recipes/benchmarks/survival.py --kills 6 --modes single ddp2 --results runs/survival

Writes survival.json into the results folder, and exits with 1 if a life ended otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

MODES = {"single": 1, "ddp2": 2, "fsdp2": 2}
PHASES = ("step", "evaluation", "checkpoint", "anchor")
KILLS_A_LIFE = 3
STEPS = 12
PATIENCE_SECONDS = 180.0


def main() -> int:
    """Run all lives, print what happened, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="in all, three a life, spread over the modes")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "benchmarks")
    options = parser.parse_args()

    _import_once()
    from hf_reset.files import write_atomic
    from hf_reset.report.environment import environment_record

    chance, kills, lives = random.Random(options.seed), [], []
    count = max(1, round(options.kills / KILLS_A_LIFE))
    with tempfile.TemporaryDirectory() as folder:
        references = {mode: _reference(mode, Path(folder) / f"{mode}-reference") for mode in options.modes}
        for life in range(count):
            mode = options.modes[life % len(options.modes)]
            home = Path(folder) / f"{mode}-{life}"
            for _ in range(KILLS_A_LIFE):
                kills.append({"life": life, **_killed_run(mode, home, chance)})
                print(f"life {life + 1}/{count}  {json.dumps(kills[-1])}", flush=True)
            identical = _finished_run(mode, home) == references[mode]
            lives.append({"life": life, "mode": mode, "identical": identical})
            print(f"life {life + 1}/{count}  {mode} ended {'identical' if identical else 'DIFFERENT'}", flush=True)
    record = {
        "benchmark": "survival",
        "configuration": {key: value for key, value in vars(options).items() if key != "results"},
        "environment": environment_record(),
        "kills_by_phase": Counter(f"{kill['mode']} {kill['phase']}" for kill in kills),
        "kills": kills,
        "lives": lives,
    }
    write_atomic(options.results / "survival.json", json.dumps(record, indent=2) + "\n")
    failed = [life for life in lives if not life["identical"]]
    print(f"{len(kills)} kills in {len(lives)} lives; {len(lives) - len(failed)} ended bit-identical")
    return 1 if failed else 0


def _import_once() -> None:
    """The heavy imports, once: every process of every run is forked from this one."""
    import torch
    import transformers.trainer  # noqa: F401

    import hf_reset.training.trainer  # noqa: F401

    torch.set_num_threads(1)


def _reference(mode: str, home: Path) -> list[str]:
    return _finished_run(mode, home)


def _finished_run(mode: str, home: Path) -> list[str]:
    """Run (or resume) to the end; a digest of each rank's final state."""
    pids, pipe = _launch(mode, home)
    deadline = time.monotonic() + PATIENCE_SECONDS
    statuses = [_wait(pid, deadline) for pid in pids]
    os.close(pipe)
    if any(statuses):
        raise RuntimeError(f"A {mode} run in {home.name} ended with {statuses}: {_errors(home)}")
    return [(home / f"end-rank{rank}").read_text() for rank in range(MODES[mode])]


def _killed_run(mode: str, home: Path, chance: random.Random) -> dict[str, Any]:
    """Run (or resume), and kill it at a random instant of a random phase."""
    from hf_reset import last_whole_checkpoint

    whole = last_whole_checkpoint(home, world_size=MODES[mode]) if home.exists() else None
    done = int(whole.rsplit("-", 1)[1]) if whole else 0
    aim = chance.choice(PHASES)
    skip = chance.randrange(max(1, (STEPS - done) // 2))
    pids, pipe = _launch(mode, home)
    said = _until(pipe, aim, skip)
    time.sleep(chance.uniform(0, {"step": 0.01, "evaluation": 0.02, "checkpoint": 0.04, "anchor": 0.008}[aim]))
    first = chance.sample(pids, chance.randrange(1, len(pids) + 1))
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    time.sleep(chance.uniform(0, 0.05) if len(first) < len(pids) else 0)
    for pid in pids:  # a launcher ends the ranks that are left
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    said += _drain(pipe)
    os.close(pipe)
    return {
        "mode": mode,
        "aim": aim,
        "phase": _innermost(said),
        "step": sum(word == "+step" for word in said) + done,
        "resumed_from": done,
        "ranks_killed_first": len(first),
    }


def _launch(mode: str, home: Path) -> tuple[list[int], int]:
    """Fork one process a rank; rank 0 says on the pipe which phase it is in."""
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reading, writing = os.pipe()
    pids = []
    for rank in range(MODES[mode]):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                _be_rank(mode, home, rank, port, writing)
                status = 0
            except BaseException:
                (home / f"error-rank{rank}").write_text(traceback.format_exc())
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(writing)
    return pids, reading


def _be_rank(mode: str, home: Path, rank: int, port: int, pipe: int) -> None:
    quiet = os.open(home / f"output-rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if MODES[mode] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(MODES[mode]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    trainer = _trainer(mode, home, pipe if rank == 0 else None)
    from hf_reset import last_whole_checkpoint

    whole = last_whole_checkpoint(home, world_size=MODES[mode])
    trainer.train(resume_from_checkpoint=True if whole else None)
    (home / f"end-rank{rank}").write_text(_digest(trainer))


def _trainer(mode: str, home: Path, pipe: int | None) -> Any:
    """A small BERT on random rows; what matters is every byte of its state, not what it learns."""
    import torch
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    from hf_reset import ResetTrainer, StochasticResetCallback

    def say(word: str) -> None:
        if pipe is not None:
            os.write(pipe, (word + "\n").encode())

    class SpeakingCallback(StochasticResetCallback):
        def save_anchor(self, *args: Any, **kwargs: Any) -> None:
            say("+anchor")
            super().save_anchor(*args, **kwargs)
            say("-anchor")

    class SpeakingTrainer(ResetTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            say("+step")
            loss = super().training_step(*args, **kwargs)
            say("-step")
            return loss

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            say("+evaluation")
            metrics = super().evaluate(*args, **kwargs)
            say("-evaluation")
            return metrics

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            say("+checkpoint")
            super()._save_checkpoint(*args, **kwargs)
            say("-checkpoint")

    if mode == "fsdp2":
        _allow_fsdp_on_cpu()
    generator = torch.Generator().manual_seed(0)
    rows = Dataset.from_dict(
        {
            "input_ids": torch.randint(1, 50, (64, 8), generator=generator).tolist(),
            "attention_mask": [[1] * 8] * 64,
            "labels": torch.randint(0, 3, (64,), generator=generator).tolist(),
        }
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,  # pyright: ignore[reportCallIssue]
        )
    )
    sharding: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["BertLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }
    arguments = TrainingArguments(
        output_dir=str(home),
        max_steps=STEPS,
        per_device_train_batch_size=8 // MODES[mode],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        logging_steps=1,
        learning_rate=5e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **(sharding if mode == "fsdp2" else {}),
    )
    return SpeakingTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(32)),
        callbacks=[SpeakingCallback(probability=0.5, patience=0, finish="last")],
    )


def _allow_fsdp_on_cpu() -> None:
    """Accelerate takes FSDP on accelerators only; for this measurement it is told that two CPUs will do."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = patched


def _digest(trainer: Any) -> str:
    """Everything that a run carries on: this rank's weights, optimizer state, anchor, audit trail, randomness."""
    import torch

    hasher = hashlib.sha256()
    for name, p in trainer.model.named_parameters():
        hasher.update(name.encode() + _local_bytes(p))
        for key, value in sorted(trainer.optimizer.state[p].items()):
            hasher.update(key.encode() + _local_bytes(value))
    callback = trainer.reset_callback
    for name, tensor in callback.store.tensors().items():
        hasher.update(name.encode() + _local_bytes(tensor))
    trail = [(event["kind"], event["step"], event["metric"]) for event in callback.events]
    hasher.update(repr((trail, callback.reset_state, trainer.state.global_step)).encode())
    hasher.update(torch.random.get_rng_state().numpy().tobytes())
    return hasher.hexdigest()


def _local_bytes(tensor: Any) -> bytes:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().contiguous().numpy().tobytes()


def _until(pipe: int, phase: str, skip: int) -> list[str]:
    """What was said until a phase has begun for the time after `skip`; or until a run is over before."""
    said: list[str] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while sum(word == f"+{phase}" for word in said) <= skip:
        if not select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"No {phase} began within {PATIENCE_SECONDS} s; last said: {said[-3:]}")
        data = os.read(pipe, 65536).decode()
        if not data:
            break
        said += data.split()
    return said


def _drain(pipe: int) -> list[str]:
    said = ""
    while select.select([pipe], [], [], 0)[0] and (data := os.read(pipe, 65536)):
        said += data.decode()
    return said.split()


def _innermost(said: list[str]) -> str:
    """The phase that had begun last and not ended."""
    open_phases: list[str] = []
    for word in said:
        if word[0] == "+":
            open_phases.append(word[1:])
        elif word[1:] in open_phases:
            open_phases.remove(word[1:])
    return open_phases[-1] if open_phases else "between"


def _wait(pid: int, deadline: float) -> int:
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


def _errors(home: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(home.glob("error-rank*"))) or "killed at its time limit"


if __name__ == "__main__":
    sys.exit(main())
