"""Files and folders that are there whole or not at all, whatever stops a process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, to write a file or a folder under; on leaving it becomes `path`.

    What was written is flushed to disk before it is renamed, and the rename after. An error inside leaves what lay
    at `path` as it was, and no litter.

    Args:
        path: where it shall lie; its folder is made if need be. A folder can replace an empty one only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        move_flushed(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def write_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` as UTF-8, whole or not at all.

    Returns:
        The path.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def move_flushed(source: Path, target: Path) -> None:
    """Rename a file or a folder over `target` once its bytes are on disk, and see the rename on disk too."""
    for one in [source, *source.rglob("*")] if source.is_dir() else [source]:
        _flush(one)
    os.replace(source, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
