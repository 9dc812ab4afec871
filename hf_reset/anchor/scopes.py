"""Which parameters a scope selects on a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.batchnorm import _NormBase

from hf_reset.config import Scope
from hf_reset.errors import ScopeError, UnsupportedError

_AROUND = (nn.parallel.DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel)
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def select_parameters(model: nn.Module, scope: Scope = "all") -> dict[str, nn.Parameter]:
    """The trainable parameters that `scope` selects, by name, in model order. Tied weights are listed once.

    Args:
        model: any module; transformers and PEFT models for the scopes that need structure. Wrappers of DDP,
            FSDP1, activation checkpointing and `torch.compile` are looked through, so names are those of the
            model inside.
        scope:
            "all": every trainable parameter.
            "head": what lies outside the base model (`base_model_prefix`), and on a PEFT model the
            trainable copies of `modules_to_save`.
            "adapters": what a PEFT method added and trains, of the active adapter; never `modules_to_save`.
            "peft": everything that PEFT trains: the adapters, `modules_to_save` (a classifier's new head), and
            modules of PEFT's own such as X-LoRA's classifier. Take it wherever a head is trained beside adapters:
            under "adapters" a reset leaves that head where it is.
            "last:K": the last K blocks of the longest stack of blocks, and the head.
            Any other string: a regular expression, `re.search` on parameter names.
            A list: names of parameters or modules, whole or as suffixes at a dot.

    Returns:
        Name to parameter, never empty.

    Raises:
        ScopeError: the scope selects nothing trainable, everything by accident, or a tied head.
    """
    model = unwrapped(model)
    named = named_parameters(model)
    if scope == "all":
        chosen = set(named)
    elif scope == "head":
        chosen = _head(model, named)
    elif scope == "adapters":
        chosen = _adapters(model, named)
    elif scope == "peft":
        chosen = _peft(model, named)
    elif isinstance(scope, str) and re.fullmatch(r"last:\d+", scope):
        chosen = _last_blocks(model, named, int(scope[5:]))
    elif isinstance(scope, str):
        chosen = _matching(model, named, scope)
    else:
        chosen = _listed(model, named, list(scope))
    if scope != "all" and len(chosen) == len(named) > 0:
        raise ScopeError(
            f'`scope` {scope!r} selects every parameter of {type(model).__name__}. If that is meant, say "all"; '
            "if not, name the part to reset by a regular expression or a list."
        )
    selected = {name: p for name, p in named.items() if name in chosen and p.requires_grad}
    if not selected:
        raise ScopeError(_nothing(model, named, scope, chosen))
    return selected


def covers_all(model: nn.Module, selected: dict[str, nn.Parameter]) -> bool:
    """Whether `selected` holds every trainable parameter, so that a reset of it is a full one."""
    return all(name in selected for name, p in named_parameters(unwrapped(model)).items() if p.requires_grad)


def refuse_rank_allocation(model: nn.Module, selected: dict[str, nn.Parameter]) -> None:
    """AdaLoRA keeps more than its weights: importance averages and a rank pattern, which decide what is masked next.

    A reset would not bring them back, a step whose backward is skipped has no gradient for them, and an adapter
    would be saved with the last step's ranks and the anchor's weights.

    Raises:
        UnsupportedError: `selected` has weights of an AdaLoRA layer.
    """
    if any(type(module).__module__.startswith("peft.tuners.adalora") for module in model.modules()):
        adapters = _adapter_names(model, dict(model.named_parameters()))
        taken = next((name for name in selected if name in adapters), None)
        if taken is not None:
            raise UnsupportedError(
                f"Resets of AdaLoRA's weights ({taken!r}) are not supported: its rank allocator keeps importance "
                "averages and a rank pattern beside them, which a reset would leave behind. Use `LoraConfig`, with "
                '`use_rslora` or `use_dora` if need be, or a `scope` without the adapters and `finish="last"`.'
            )


def batch_norm_buffers(model: nn.Module) -> list[str]:
    """Names of the running statistics of BatchNorm layers: they belong to the weights that were evaluated."""
    model = unwrapped(model)
    return [
        _plain(f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer is not None
    ]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, FSDP1, DeepSpeed's engine and `torch.compile`."""
    while True:
        inner: Any = getattr(model, "module", None)
        engine = type(model).__module__.startswith("deepspeed.") and isinstance(inner, nn.Module)
        if engine or isinstance(model, _AROUND):
            model = inner
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model


def named_parameters(model: nn.Module, *, tied: bool = False) -> dict[str, nn.Parameter]:
    """Parameters by name, without the parts of names that wrappers of modules inside add."""
    return {_plain(name): p for name, p in model.named_parameters(remove_duplicate=not tied)}


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _base(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The task model inside PEFT, and the base model (encoder or decoder) inside that, if it has one."""
    inner = getattr(model, "get_base_model", lambda: model)()
    base = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
    return inner, base if isinstance(base, nn.Module) and base is not inner else None


def _names_of(named: dict[str, nn.Parameter], module: nn.Module) -> set[str]:
    """Names, in the whole model, of the parameters of `module`."""
    inside = {id(p) for p in module.parameters()}
    return {name for name, p in named.items() if id(p) in inside}


def _head(model: nn.Module, named: dict[str, nn.Parameter]) -> set[str]:
    inner, base = _base(model)
    saved = _modules_to_save(model, named)
    if base is None:
        if saved:
            return saved
        raise ScopeError(
            f'`scope` "head" cannot be told apart on {type(inner).__name__}: it has no base model under '
            "`base_model_prefix`, so the head would be everything. Name the head's parameters by a regular "
            "expression or a list."
        )
    _refuse_tied_head(inner, named, "head")
    outside = _names_of(named, inner) - _names_of(named, base)
    return (outside - _adapter_names(model, named)) | saved


def _refuse_tied_head(inner: nn.Module, named: dict[str, nn.Parameter], scope: str) -> None:
    """A trainable output layer tied to the embeddings cannot go back without them."""
    output = getattr(inner, "get_output_embeddings", lambda: None)()
    weight = getattr(output, "weight", None)
    if weight is None or not weight.requires_grad:
        return
    tied = next((name for name, p in named.items() if p is weight), None)
    embeddings = getattr(inner, "get_input_embeddings", lambda: None)()
    if tied is not None and getattr(embeddings, "weight", None) is weight:
        raise ScopeError(
            f"`scope` {scope!r} would reset the output head of {type(inner).__name__}, which is tied to the input "
            f"embeddings {tied!r}: resetting one resets both. Choose other layers by a regular expression, or load "
            "the model with `tie_word_embeddings=False`."
        )


def _last_blocks(model: nn.Module, named: dict[str, nn.Parameter], count: int) -> set[str]:
    inner, base = _base(model)
    stacks = [module for module in (base or inner).modules() if isinstance(module, nn.ModuleList)]
    blocks = max(stacks, key=len, default=None)
    if blocks is None or len(blocks) < 2:
        raise ScopeError(
            f'`scope` "last:{count}" needs a stack of blocks (nn.ModuleList), and {type(inner).__name__} has none. '
            "Name the layers by a regular expression or a list."
        )
    if not 1 <= count <= len(blocks):
        raise ScopeError(
            f'`scope` "last:{count}" asks for {count} blocks of the {len(blocks)} that {type(inner).__name__} has. '
            f"K must be between 1 and {len(blocks)}."
        )
    chosen: set[str] = set()
    for block in list(blocks)[-count:]:
        chosen |= _names_of(named, block)
    if base is not None:
        _refuse_tied_head(inner, named, f"last:{count}")
        chosen |= _names_of(named, inner) - _names_of(named, base)
    return chosen | _modules_to_save(model, named)


def _peft(model: nn.Module, named: dict[str, nn.Parameter]) -> set[str]:
    """Adapters, trainable copies of modules, and whatever lies in PEFT's wrapper and not in the model inside."""
    names = _adapters(model, named, "peft") | _modules_to_save(model, named)
    if hasattr(model, "get_base_model"):
        names |= set(named) - _names_of(named, _base(model)[0])
    return names


def _adapters(model: nn.Module, named: dict[str, nn.Parameter], scope: str = "adapters") -> set[str]:
    names = _adapter_names(model, named)
    if not names:
        raise ScopeError(
            f'`scope` "{scope}" needs a PEFT model, and {type(model).__name__} has no adapter. Wrap it with '
            '`peft.get_peft_model(model, LoraConfig(...))`, or choose "all", "head" or "last:K".'
        )
    return names


def _adapter_names(model: nn.Module, named: dict[str, nn.Parameter]) -> set[str]:
    """What a PEFT method added: inside a tuner layer, under its name prefix, or a prompt encoder.

    A trained bias of the base (`bias="lora_only"` or "all") belongs to the adapter too, as it does in PEFT's
    own adapter files. A frozen weight of the base inside a tuner layer is no matter: only what is trainable
    is selected in the end.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: set[str] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            names |= _names_of(named, module)
    configs = getattr(model, "peft_config", None)
    if not names and not configs:
        return set()
    # Adaption prompts are the one method whose tuner names no prefix.
    prefixes = (getattr(getattr(model, "base_model", None), "prefix", None) or "adaption_", "adaption_")
    for name in named:
        parts = [part for part in name.split(".") if part != "lora_model"]  # X-LoRA's wrapper of the whole model
        if "prompt_encoder" in parts or any(part.startswith(prefixes) for part in parts):
            names.add(name)
    if isinstance(configs, dict) and any(getattr(c, "bias", "none") == "all" for c in configs.values()):
        names |= {name for name in named if name.endswith(".bias")}
    return names - _modules_to_save(model, named)


def _modules_to_save(model: nn.Module, named: dict[str, nn.Parameter]) -> set[str]:
    from peft.utils.other import ModulesToSaveWrapper

    names: set[str] = set()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            names |= _names_of(named, module.modules_to_save)
    return names


def _matching(model: nn.Module, named: dict[str, nn.Parameter], pattern: str) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ScopeError(f"`scope` {pattern!r} is not a valid regular expression: {error}.") from None
    chosen = {name for name in named if compiled.search(name)}
    _refuse_alias(model, named, pattern, chosen, lambda name: compiled.search(name) is not None)
    return chosen


def _listed(model: nn.Module, named: dict[str, nn.Parameter], items: list[str]) -> set[str]:
    chosen: set[str] = set()
    for item in items:
        hit = {name for name in named if _ends_with(name, item)}
        if not hit:
            _refuse_alias(model, named, item, hit, lambda name, item=item: _ends_with(name, item))
            close = difflib.get_close_matches(item, _paths(named), n=3)
            hint = f"Close names: {', '.join(close)}." if close else f"It has, for one, {next(iter(named), 'none')!r}."
            raise ScopeError(f"`scope` names {item!r}, which {type(model).__name__} does not have. {hint}")
        chosen |= hit
    return chosen


def _ends_with(name: str, item: str) -> bool:
    """Whether `item` is the parameter or a module around it, whole or as a suffix that begins at a dot."""
    return any(path == item or path.endswith("." + item) for path in _ancestry(name))


def _ancestry(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _paths(named: dict[str, nn.Parameter]) -> list[str]:
    return list(dict.fromkeys(path for name in named for path in _ancestry(name)))


def _refuse_alias(
    model: nn.Module, named: dict[str, nn.Parameter], scope: str, chosen: set[str], match: Callable[[str], bool]
) -> None:
    """Say it when a scope names a tied weight by the name under which it is not listed."""
    by_identity = {id(p): name for name, p in named.items()}
    for alias, p in named_parameters(model, tied=True).items():
        owner = by_identity[id(p)]
        if alias != owner and owner not in chosen and match(alias):
            raise ScopeError(
                f"`scope` {scope!r} names {alias!r}, which is tied to {owner!r}: resetting one resets both. "
                f"Name {owner!r} if that is meant, or load the model with `tie_word_embeddings=False`."
            )


def _nothing(model: nn.Module, named: dict[str, nn.Parameter], scope: Scope, chosen: set[str]) -> str:
    name = type(model).__name__
    if not any(p.requires_grad for p in named.values()):
        return f"`scope` {scope!r} selects nothing: {name} has no trainable parameter. Unfreeze some first."
    if chosen:
        return (
            f"`scope` {scope!r} selects {len(chosen)} parameters of {name}, and all of them are frozen. "
            "Unfreeze some, or choose a scope that trains."
        )
    names = [n for n, p in named.items() if p.requires_grad]
    shown = ", ".join(names[:3] + (["…"] if len(names) > 4 else []) + names[3:][-1:])
    return f"`scope` {scope!r} selects nothing on {name}. Its trainable parameters: {shown}."
