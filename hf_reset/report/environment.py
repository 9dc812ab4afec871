"""Where a run took place, and the most memory it took."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "peft",
    "trl",
    "numpy",
    "hf-reset",
)


def environment_record(device: torch.device | None = None, *, processes: int = 1) -> dict[str, Any]:
    """Where a run took place: versions, platform, cores, device.

    Args:
        device: the `torch.device` trained on; None says nothing of a device.
        processes: number of processes that trained together.

    Returns:
        JSON-plain; `packages` maps each installed package of interest to its version.
    """
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "processes": processes,
    }
    for name in _PACKAGES:
        try:
            record["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device is not None:
        record["device"] = _device_name(device)
        record["peak_memory_is"] = _peak_memory_meaning(device)
    return record


def reset_peak_memory(device: torch.device) -> None:
    """Begin to count peak memory afresh, as far as the platform lets us (see `peak_memory_bytes`)."""
    if _is_cuda(device):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets the peak resident set size, VmHWM
    except OSError:
        pass


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used since `reset_peak_memory`, in bytes.

    On CUDA what torch allocated on the device; elsewhere the resident set of this process (on Linux since the
    count was begun, on other systems since the process started; 0 where neither can be read).
    """
    if _is_cuda(device):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    except (OSError, StopIteration):
        return _lifetime_peak_bytes()


def _is_cuda(device: torch.device) -> bool:
    return getattr(device, "type", None) == "cuda"


def _device_name(device: torch.device) -> str:
    if _is_cuda(device):
        import torch

        return torch.cuda.get_device_name(device)
    return str(getattr(device, "type", device))


def _peak_memory_meaning(device: torch.device) -> str:
    if _is_cuda(device):
        return "allocated by torch on the device, of the main process"
    if os.access("/proc/self/clear_refs", os.W_OK):
        return "resident set of the main process during the run"
    return "resident set of the main process since it started"


def _lifetime_peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if platform.system() == "Darwin" else 1024)
