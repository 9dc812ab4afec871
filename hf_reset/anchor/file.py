"""A copy of live views on disk: a safetensors file, or under FSDP2 one directory for all ranks.

Keys become strings here and nowhere else. A file is written whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_reset.anchor.copies import Copy, Key, Live, LiveViews
from hf_reset.anchor.dtensor_file import read_shared_header, read_shares, write_shares
from hf_reset.anchor.ranks import together
from hf_reset.errors import AnchorFileError
from hf_reset.files import written_whole

FORMAT = "hf_reset-anchor-2"  # 2: the form of the optimizer in the header
Header = dict[str, str]
Shapes = dict[Key, torch.Size]


def write_copy(
    path: str | os.PathLike[str], held: Mapping[Key, Tensor], header: Header, views: LiveViews | None = None
) -> None:
    """Write what a copy holds: this rank's share of it, and under FSDP2 all ranks at once to one path.

    Args:
        path: the file, or the directory under FSDP2.
        held: values by key.
        header: strings to keep beside them.
        views: the live views they are copies of, which know how ranks share them; None: nothing is shared.

    Raises:
        AnchorFileError: the disk is full or the place cannot be written.
    """
    if views is not None and views.layout == "rows":
        write_shares(Path(path), {str(key): views.whole(key, share) for key, share in held.items()}, header)
    else:
        _write(Path(path), {str(key): tensor.contiguous() for key, tensor in held.items()}, header)


def read_copy(
    path: str | os.PathLike[str],
    copy: Copy,
    live: Live,
    views: LiveViews,
    *,
    check: Callable[[Header, Shapes], None],
    wanted: Callable[[Key], bool] = lambda key: True,
) -> Header:
    """Fill `copy` from what `write_copy` wrote; under FSDP2 to be called on every rank.

    Values are cast to the dtype and the device that a copy of the live ones has; where there is no live one, they
    keep their dtype.

    Args:
        path: the file, or the directory under FSDP2.
        copy: what to fill; it is left alone if anything is wrong.
        live: the live values by key.
        views: where they come from.
        check: given the header and the whole tensors' shapes; it raises if they do not fit.
        wanted: which keys to take.

    Returns:
        The header.

    Raises:
        AnchorFileError: it is missing, truncated, or not an anchor's.
    """
    if views.layout == "rows":
        return _read_rows(Path(path), copy, live, views, check, wanted)
    header, tensors = read_anchor_file(path)
    check(header, {key: tensor.shape for key, tensor in tensors.items()})
    held = {}
    for key, tensor in tensors.items():
        if wanted(key):
            held[key] = _room_for(key, tensor.shape, tensor.dtype, copy, live, views)
            held[key].copy_(tensor)
    copy.held = held
    return header


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was saved beside an anchor, without loading it."""
    return json.loads(read_anchor_file(path)[0]["metadata"])


def read_anchor_file(path: str | os.PathLike[str]) -> tuple[Header, dict[Key, Tensor]]:
    """The header and the tensors (on the CPU) of a file, not a directory, that `write_copy` wrote.

    Raises:
        AnchorFileError: it is missing, truncated, or not an anchor file.
    """
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            header = file.metadata() or {}
            tensors = {Key.parse(text): file.get_tensor(text) for text in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AnchorFileError(
            f"There is no anchor file {str(path)!r}. Resume from a checkpoint that has one, or start without "
            "`resume_from_checkpoint`."
        ) from None
    except (SafetensorError, OSError) as error:
        raise AnchorFileError(
            f"The anchor file {str(path)!r} is truncated or not a safetensors file ({error}). Resume from an "
            "earlier, whole checkpoint."
        ) from None
    if header.get("format") != FORMAT:
        raise AnchorFileError(
            f"The file {str(path)!r} is not an anchor written by hf_reset (format {header.get('format')!r}, "
            f"expected {FORMAT!r}). Name the `reset_anchor.safetensors` of a checkpoint."
        )
    return header, tensors


def _write(path: Path, tensors: dict[str, Tensor], header: Header) -> None:
    try:
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, **header})
    except (OSError, SafetensorError) as error:
        raise AnchorFileError(
            f"The anchor file {str(path)!r} could not be written: {error}. Free the disk or choose another "
            "`output_dir`; the last whole checkpoint is untouched."
        ) from error


def _read_rows(
    path: Path,
    copy: Copy,
    live: Live,
    views: LiveViews,
    check: Callable[[Header, Shapes], None],
    wanted: Callable[[Key], bool],
) -> Header:
    with together():
        header, stored = read_shared_header(path)
        known = {Key.parse(text): value for text, value in stored.items()}
        check(header, {key: value.size for key, value in known.items()})
    held = {}
    for key, value in known.items():  # pyright: ignore[reportPossiblyUnboundVariable]
        if wanted(key):
            share = views.shards.weights(key.name)["parameter"] if key.entry and key.name else None
            is_share = share is not None and views.shards.whole(key.name, share).shape == value.size
            size = share.shape if share is not None and is_share else value.size
            held[key] = _room_for(key, size, value.properties.dtype, copy, live, views)
    read_shares(path, {str(key): views.whole(key, tensor) for key, tensor in held.items()})
    copy.held = held
    return header  # pyright: ignore[reportPossiblyUnboundVariable]


def _room_for(key: Key, size: torch.Size, dtype: torch.dtype, copy: Copy, live: Live, views: LiveViews) -> Tensor:
    """Memory for a value read from a file: as for the live one, where there is one, else as it was written."""
    like = live.get(key)
    if not isinstance(like, Tensor):
        like = torch.empty(size, dtype=dtype, device=views.device_of(key))
    return copy.room(like)
