"""Rows in two gloo processes: DDP and FSDP remember what one process would, agree, resume exactly, and refuse."""

import numpy as np
import pytest
import torch
from launch import HERE, launch, results
from rows import remembered, responses
from test_ddp_fsdp import found, same

pytestmark = pytest.mark.distributed

CHECKS = [f"{mode}-{loss}" for mode in ("ddp", "fsdp") for loss in ("plain", "elr")]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    names = [*CHECKS, "ddp-resumed", "fsdp-resumed", "fsdp1-plain", "refused", "responses"]
    return results(launch(HERE / "rows.py", folder, *names), folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {loss: remembered("ddp", loss, tmp_path_factory.mktemp(loss)) for loss in ("plain", "elr")}


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_remember_what_one_does(of_two, alone, check):
    ours, one = found(of_two, check), alone[check.split("-")[1]]
    assert ours["resets"] == one["resets"] >= 3
    assert ours["state"].keys() == one["state"].keys()
    for name, tensor in one["state"].items():
        if tensor.is_floating_point():  # logits differ by rounding, as the batches are cut in two
            torch.testing.assert_close(ours["state"][name], tensor, rtol=1e-3, atol=1e-4, equal_nan=True)
        else:
            assert torch.equal(ours["state"][name], tensor), name
    assert (ours["state"]["memory.total.visits"] >= 1).float().mean() > 0.9


@pytest.mark.parametrize("check", [*CHECKS, "fsdp1-plain"])
def test_all_processes_remember_the_same(of_two, check):
    one, other = (ranks[check] for ranks in of_two)
    assert one["suspects"].equals(other["suspects"])
    assert all(
        torch.equal(tensor.nan_to_num(-1), other["state"][name].nan_to_num(-1)) for name, tensor in one["state"].items()
    )


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_resume_is_exact(of_two, mode):
    runs = found(of_two, f"{mode}-resumed")
    assert runs["whole"]["refinement.is_suspect"].any()
    assert {"refinement.targets", "loss.targets", "memory.classes"} <= runs["whole"].keys()
    whole, again = ({k: v.nan_to_num(-1) for k, v in runs[name].items()} for name in ("whole", "again"))
    assert same(whole, again)


def test_two_processes_know_the_loss_of_each_response(of_two, tmp_path):
    one = responses(tmp_path)
    for rank in of_two:
        np.testing.assert_allclose(rank["responses"]["losses"], one["losses"], rtol=1e-5)
        assert rank["responses"]["armed"] == one["armed"]
        assert rank["responses"]["margin"] == pytest.approx(one["margin"], rel=0.1)
        assert rank["responses"]["resets"] == one["resets"] > 0
        torch.testing.assert_close(
            rank["responses"]["looked_at"], one["looked_at"], rtol=1e-4, atol=1e-5, equal_nan=True
        )
        assert torch.equal(rank["responses"]["is_suspect"], one["is_suspect"])
        assert 0 < one["is_suspect"].sum() < 39


def test_refusals_reach_all_processes(of_two):
    for rank in of_two:
        assert rank["refused"]["kind"] == "UnsupportedError"
        assert "`reset_row_memory=True` needs to know the rows" in rank["refused"]["text"]
