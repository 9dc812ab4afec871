"""The anchor of a PEFT model as an ordinary adapter directory, for use without this package, and back."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_reset.anchor.scopes import named_parameters, unwrapped
from hf_reset.anchor.store import AnchorStore
from hf_reset.errors import AnchorError, AnchorFileError, ConfigError, UnsupportedError
from hf_reset.files import move_flushed

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter_anchor(
    store: AnchorStore, model: nn.Module, folder: str | os.PathLike[str], *, adapter: str | None = None
) -> Path:
    """Write the model as a reset would leave it: what `PeftModel.from_pretrained(base, folder)` reads.

    What is trained outside the anchor's scope (`modules_to_save` under the scope "adapters") goes in with its live
    value, or with that of the snapshot where the anchor keeps it too (`keep_rest`, as in a run with `finish="anchor"`).
    Each file is written under another name and renamed. Call it on one process.

    Args:
        store: the anchor; its scope selects parameters of `model`.
        model: the PEFT model in training, wrapped or not.
        folder: the directory, made if need be. Adapter weights that lie there are replaced.
        adapter: which adapter; None: the active one.

    Returns:
        The directory, with `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        AnchorError: there is no anchor yet.
        ConfigError: the model is no PEFT model, has no such adapter, or several are active.
        UnsupportedError: the weights are sharded, so that this process holds a share of them only.
    """
    peft_model, adapter = _adapter_of(model, adapter)
    _refuse_sharded(store)
    if not store.is_set:
        raise AnchorError("the anchor cannot be saved before it is taken. Call `snapshot` first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".adapter-", suffix=".tmp", dir=folder))
    try:
        with store.swapped():
            peft_model.save_pretrained(str(temporary), selected_adapters=[adapter], is_main_process=True)
        written = temporary if (temporary / CONFIG).is_file() else temporary / adapter
        _move_in(written, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_adapter_anchor(
    store: AnchorStore, model: nn.Module, folder: str | os.PathLike[str], *, adapter: str | None = None
) -> None:
    """Make the weights of an adapter directory the anchor; live parameters change at the next `restore` only.

    The directory says nothing of the optimizer: the anchor keeps the optimizer state it had, or takes the live one
    where there was no anchor.

    Args:
        store: the anchor to fill.
        model: the PEFT model in training, of the same architecture and adapter configuration.
        folder: an adapter directory, by `save_adapter_anchor` or by PEFT.
        adapter: which adapter of `model`; None: the active one.

    Raises:
        AnchorFileError: the directory is missing or cannot be read, or its weights are not those of this adapter.
        ConfigError: the model is no PEFT model, has no such adapter, or several are active.
        UnsupportedError: the weights are sharded.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    peft_model, adapter = _adapter_of(model, adapter)
    _refuse_sharded(store)
    read = _read_weights(Path(folder))
    expected = get_peft_model_state_dict(peft_model, adapter_name=adapter)
    _check_fit(folder, adapter, read, expected)
    if not store.is_set:
        store.snapshot()
    inside = set(store.names)
    outside = [p for name, p in named_parameters(peft_model).items() if p.requires_grad and name not in inside]
    with torch.no_grad():
        kept = [p.detach().clone() for p in outside]
        with store.swapped():  # live parameters and anchor change places, so writing one writes the other
            set_peft_model_state_dict(peft_model, read, adapter_name=adapter)
        for parameter, value in zip(outside, kept, strict=True):
            parameter.copy_(value)


def _adapter_of(model: nn.Module, adapter: str | None) -> tuple[PeftModel, str]:
    from peft import PeftModel

    peft_model = unwrapped(model)
    if not isinstance(peft_model, PeftModel):
        raise ConfigError(
            f"`model` is {type(peft_model).__name__}, not a PEFT model, so it has no adapter. Save its anchor with "
            "`AnchorStore.save`."
        )
    if adapter is None:
        active = peft_model.active_adapters
        if len(active) != 1:
            raise ConfigError(f"the adapters {', '.join(active)} are all active. Say which one with `adapter`.")
        adapter = active[0]
    if adapter not in peft_model.peft_config:
        raise ConfigError(f"`adapter` is {adapter!r}, and the model has {', '.join(peft_model.peft_config)}.")
    return peft_model, adapter


def _refuse_sharded(store: AnchorStore) -> None:
    if store.layout != "whole":
        raise UnsupportedError(
            "the weights are sharded, and an adapter directory needs them whole. Save the model with "
            "`Trainer.save_model` after training, or the anchor with `AnchorStore.save`."
        )


def _move_in(source: Path, folder: Path) -> None:
    """Rename the files of `source` over those of `folder`; weights never lie beside another's configuration."""
    old = folder / CONFIG
    if old.is_file() and old.read_bytes() != (source / CONFIG).read_bytes():
        (folder / WEIGHTS).unlink(missing_ok=True)
    for name in (CONFIG, WEIGHTS):
        move_flushed(source / name, folder / name)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AnchorFileError(
            f"{str(folder / WEIGHTS)!r} cannot be read ({error}). Give a whole adapter directory."
        ) from error


def _check_fit(
    folder: str | os.PathLike[str],
    adapter: str,
    read: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
) -> None:
    shapes, wanted = ({key: tuple(value.shape) for key, value in part.items()} for part in (read, expected))
    if shapes == wanted:
        return
    differing = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
    key = differing[0]
    raise AnchorFileError(
        f"the adapter in {str(folder)!r} does not fit adapter {adapter!r} of this model: {len(differing)} tensors "
        f"differ, the first {key} ({shapes.get(key, 'absent')} there, {wanted.get(key, 'absent')} here). Use the same "
        "base model, rank, targets and modules_to_save."
    )
