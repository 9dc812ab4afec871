"""Start a script in several gloo processes on this machine, and never wait for it longer than said."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """How a launch ended: exit status (None: it ran out of time and was killed), output, and seconds."""

    status: int | None
    output: str
    seconds: float


def command(script: str | Path, *arguments: str, processes: int = 2, python: str = sys.executable) -> list[str]:
    """A torchrun command line; the port is a free one, so that launches can stand side by side."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [python, *torchrun, str(script), *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """One thread a process, no hub, and the helpers of the tests to import."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    return {**os.environ, **fixed, **more}


def launch(
    script: str | Path, *arguments: str, processes: int = 2, timeout: float = 240, python: str = sys.executable, **env
) -> Run:
    """Run `script` in `processes` processes; after `timeout` seconds all of them are killed."""
    if python != sys.executable:
        # DeepSpeed compiles its gloo kernel at the first launch. Two environments that share the user's cache would
        # each compile it anew, and wait for ever on the lock of a build that was killed.
        env.setdefault("TORCH_EXTENSIONS_DIR", str(Path(python).parent.parent / "torch_extensions"))
    started = time.monotonic()
    process = subprocess.Popen(
        command(script, *arguments, processes=processes, python=python),
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        _kill_all(process.pid)
        output, status = process.communicate()[0], None
    return Run(status, output, time.monotonic() - started)


def deepspeed_python() -> str:
    """The interpreter of DeepSpeed's environment, built at the first call; skips in words where it does not install."""
    build = ["bash", str(HERE / "deepspeed_env.sh"), sys.executable]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.skip(f"DeepSpeed does not install here: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip().splitlines()[-1]


def _kill_all(pid: int) -> None:
    """A launcher and its workers, which are in sessions of their own and would keep its output open."""
    launcher = psutil.Process(pid)
    for one in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def results(run: Run, folder: Path, processes: int = 2) -> list[dict]:
    """What `worker.write` left on each rank, in rank order."""
    assert run.status == 0, f"status {run.status} after {run.seconds:.0f} s\n{run.output[-6000:]}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
