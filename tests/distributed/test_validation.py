"""In two processes figures, races and row memories are those of one: padding does not count, and no row is lost."""

import pytest
import torch
from launch import HERE, launch, results
from validation import calibrated, raced, remembered

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return results(launch(HERE / "validation.py", str(folder)), folder)


def test_calibrated_loss_leaves_padding_out(ranks, tmp_path):
    alone = calibrated(tmp_path / "alone")
    for rank in ranks:
        for way in ("whole", "batches"):
            for name in ("eval_calibrated_loss", "eval_label_noise", "eval_temperature"):
                assert rank["calibrated"][way][name] == pytest.approx(alone[way][name], rel=1e-4), (way, name)


def test_races_are_decided_alike(ranks, tmp_path):
    alone = raced(tmp_path)
    assert sum(lost == 1 for *_, lost in alone["told"]) >= 2
    for rank in ranks:
        assert rank["raced"] == alone


def test_row_memory_is_equal_to_the_last_bit(ranks, tmp_path):
    alone = remembered(tmp_path)
    assert alone["total.visits"].sum() == 320
    for rank in ranks:
        for name, tensor in alone.items():
            assert torch.equal(rank["remembered"][name].nan_to_num(9), tensor.nan_to_num(9)), name
