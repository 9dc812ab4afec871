"""An anchor whose weights are sharded by FSDP2, on disk: a `torch.distributed.checkpoint` directory.

Every rank writes its share; the ".metadata" file is written last, when all have. Since it says where each
share belongs, another number of processes reads its own shares from it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hf_reset.anchor.ranks import together
from hf_reset.errors import AnchorFileError

_HEADER = "header"


def write_shares(directory: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write DTensors, and tensors that all ranks hold alike, with a header. To be called on every rank.

    Raises:
        AnchorFileError: on every rank, if any could not write; it names that rank and its file.
    """
    with together():
        if dist.get_rank() == 0:
            (directory / ".metadata").unlink(missing_ok=True)  # not whole while it is written again
    encoded = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    _do(directory, "written", lambda: save({**tensors, _HEADER: encoded}, checkpoint_id=directory))


def read_shared_header(directory: Path) -> tuple[dict[str, str], dict[str, TensorStorageMetadata]]:
    """The header, and what is known of each whole tensor: its size and dtype. Each rank reads for itself.

    Raises:
        AnchorFileError: the directory or a share in it is missing or cut short.
    """
    metadata = _metadata(directory)
    lost = missing_share(directory)
    if lost is not None:
        raise AnchorFileError(
            f"The anchor file {str(lost)!r} is missing or cut short. Bring it back, or resume from an earlier, whole "
            "checkpoint."
        )
    known = {
        key: value for key, value in metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)
    }
    if _HEADER not in known:
        raise AnchorFileError(
            f"{str(directory)!r} is not an anchor written by hf_reset. Name the `reset_anchor` of a checkpoint."
        )
    encoded = torch.empty(known.pop(_HEADER).size, dtype=torch.uint8)
    _do(directory, "read", lambda: load({_HEADER: encoded}, checkpoint_id=directory, no_dist=True))
    return json.loads(bytes(encoded.tolist())), known


def read_shares(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place, each rank its shares. To be called on every rank.

    Raises:
        AnchorFileError: on every rank, if any could not read; it names that rank and its file.
    """
    _do(directory, "read", lambda: load(tensors, checkpoint_id=directory))


def missing_share(directory: Path) -> Path | None:
    """The first file of a share that is missing or cut short, None if the anchor is whole.

    Raises:
        AnchorFileError: there is no readable ".metadata", which is written last.
    """
    ends: dict[str, int] = {}
    for place in (_metadata(directory).storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = directory / name
        if not file.is_file() or file.stat().st_size < end:
            return file
    return None


def _metadata(directory: Path) -> Metadata:
    try:
        return FileSystemReader(directory).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise AnchorFileError(
            f'There is no whole anchor in {str(directory)!r}: its ".metadata" cannot be read ({error}). Resume from '
            "an earlier, whole checkpoint, or start without `resume_from_checkpoint`."
        ) from None


def _do(directory: Path, verb: str, action: Callable[[], object]) -> None:
    """Run a collective of `torch.distributed.checkpoint`, whose own error is no Exception, on every rank."""
    try:
        action()
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise AnchorFileError(
            f"The anchor {str(directory)!r} could not be {verb}: rank {rank} of {dist.get_world_size()} failed with "
            f"{type(cause).__name__}: {cause}. Free the disk or bring the file back; the last whole checkpoint is "
            "untouched."
        ) from error
