"""A copy of live values: keys that files of any version spell alike, and the four things it does."""

import pytest
import torch
from safetensors import safe_open
from tiny import bert

from hf_reset import AnchorStore
from hf_reset.anchor.copies import Copy, Key, LiveViews

A, B, STEP = Key("parameter", None, "a.weight"), Key("buffer", None, "n"), Key("optimizer", "step", "a.weight")


def live(dtype=torch.float32):
    return {A: torch.tensor([1.0, 2.0, 4.0], dtype=dtype), B: torch.tensor(3), STEP: 5}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (A, "parameter/a.weight"),
        (STEP, "optimizer/step/a.weight"),
        (Key("gathered", None, "b"), "gathered/b"),
        (Key("optimizer", "exp_avg", "odd/name"), "optimizer/exp_avg/odd/name"),
        (Key("parameter", None, "odd/name"), "parameter/odd/name"),
    ],
)
def test_a_key_is_spelled_as_in_the_first_version_and_read_back(key, text):
    assert str(key) == text
    assert Key.parse(text) == key


def test_an_anchor_file_has_the_first_versions_names(tmp_path):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.tensor([0])).loss.backward()
    optimizer.step()
    anchor = AnchorStore(model, optimizer, scope="head")
    anchor.snapshot()
    anchor.save(tmp_path / "anchor")
    with safe_open(tmp_path / "anchor", framework="pt") as file:
        names = set(file.keys())
        header = file.metadata()
    kinds = ("parameter", "optimizer/step", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    assert names == {f"{kind}/classifier.{part}" for kind in kinds for part in ("weight", "bias")}
    assert header["format"] == "hf_reset-anchor-2"
    assert header["scope"] == '"head"'


def test_take_and_put_back():
    values, copy = live(), Copy()
    assert not copy
    copy.take(values)
    assert copy
    assert copy.nbytes == 12 + 8 + 8
    pointer = copy.held[A].data_ptr()
    values[A].add_(1)
    values[B].add_(1)
    copy.put_back(values)
    assert values[A].tolist() == [1, 2, 4]
    assert values[B].item() == 3
    assert copy.held[STEP].item() == 5
    copy.take(values)
    assert copy.held[A].data_ptr() == pointer
    copy.put_back({})  # what is not live at the moment is passed over


def test_exchange_twice_is_nothing():
    values, copy = live(), Copy()
    copy.take(values)
    values[A].mul_(3)
    copy.exchange(values)
    assert values[A].tolist() == [1, 2, 4]
    assert copy.held[A].tolist() == [3, 6, 12]
    copy.exchange(values)
    assert values[A].tolist() == [3, 6, 12]
    assert copy.held[A].tolist() == [1, 2, 4]


def test_lerp_goes_a_part_of_the_way_and_copies_integers():
    values, copy = live(), Copy()
    copy.take(values)
    values[A].add_(1)
    values[B].add_(4)
    copy.lerp(values, 0.25)
    assert torch.equal(copy.held[A], torch.tensor([1.25, 2.25, 4.25]))
    assert copy.held[B].item() == 7


def test_small_steps_are_kept_where_half_precision_would_lose_them():
    """bfloat16 has eight bits: 1 + 2⁻¹⁰ rounds to 1, and an average in it would never move."""
    for least, expected in ((torch.float32, 1 + 4 * 2.0**-10), (None, 1.0)):
        values, copy = {A: torch.ones(1, dtype=torch.bfloat16)}, Copy(least=least)
        copy.take(values)
        for _ in range(4):
            copy.lerp({A: copy.held[A].to(torch.bfloat16) + 1}, 2.0**-10)
        assert copy.held[A].item() == pytest.approx(expected, abs=1e-5)


def test_live_views_are_the_models_own_memory():
    model = bert()
    views = LiveViews(model, scope="head")
    assert views.layout == "whole"
    assert not views.is_full
    key = Key("parameter", None, "classifier.bias")
    views.weights()[key].fill_(7)
    assert model.classifier.bias.tolist() == [7, 7, 7]
    assert views.memory.look().tensors == {}
