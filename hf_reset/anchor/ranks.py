"""What processes tell one another: when training begins, once an evaluation, and at a save. Never in a step.

With one process, or where `torch.distributed` is not at work, nothing is said and nothing is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from hf_reset.errors import ResetError

_T = TypeVar("_T")


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(value: _T) -> list[_T]:
    """The `value` of every rank, in rank order: one collective of small picklable values."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: float | None, device: torch.device) -> float | None:
    """Rank 0's `value`, on every rank: one broadcast of a number and whether there is one.

    Args:
        value: a number, or None for none.
        device: where the process group communicates (`args.device`).
    """
    if world_size() == 1:
        return value
    message = torch.tensor([value is not None, 0.0 if value is None else value], dtype=torch.float64, device=device)
    dist.broadcast(message, src=0)
    known, number = message.tolist()
    return number if known else None


def end_process_group() -> None:
    """End the process group, when a command has done its work: without this, torch now and then aborts at exit.

    Only where all went well: after an error on one rank the others may be waiting for it.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # Threads of gloo outlive the group where DDP or a device mesh holds it. One that is letting go of its last
        # tensor waits for the interpreter, and std::terminate follows if that has begun to shut down (pytorch
        # #190489): leave it free for a moment.
        time.sleep(0.2)


@contextmanager
def together() -> Iterator[None]:
    """An error that any rank meets inside is raised on every rank on leaving, so that none waits for another.

    Raises:
        ResetError: of the class the failing rank met, naming that rank. Where all ranks met the same, and with
            one process, the error itself.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    kind = type(error) if isinstance(error, ResetError) else ResetError
    reports = gathered(None if error is None else (kind, f"{type(error).__name__}: {error}", str(error)))
    failed = {rank: report for rank, report in enumerate(reports) if report is not None}
    if not failed:
        return
    if error is not None and len(failed) == len(reports) and len({report[2] for report in failed.values()}) == 1:
        raise error
    rank, (kind, name, text) = next(iter(failed.items()))
    others = f" (so did ranks {', '.join(map(str, list(failed)[1:]))})" if len(failed) > 1 else ""
    said = text if issubclass(kind, ResetError) and name.startswith(kind.__name__) else name
    raise kind(f"Rank {rank} of {len(reports)} failed{others}: {said}") from error
