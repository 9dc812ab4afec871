"""What differs or fails on one rank: both know within a bounded time, and the last whole checkpoint goes on."""

import subprocess

import pytest
import torch
from launch import HERE, launch, results

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of three megabytes, or None where mounting is not permitted."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, small_disk):
    folder = tmp_path_factory.mktemp("failures")
    disk = {} if small_disk is None else {"SMALL_DISK": str(small_disk)}
    return results(launch(HERE / "failures.py", folder, timeout=200, **disk), folder)


def found(ranks, name):
    for rank, checks in enumerate(ranks):
        assert "error" not in checks[name], f"rank {rank}: {checks[name]['error']}"
    return [checks[name] for checks in ranks]


def test_a_metric_that_differs_between_ranks_is_decided_by_rank_0_and_said(ranks):
    first, second = found(ranks, "differing-metric")
    assert first["trail"] == second["trail"]
    assert [metric for kind, _, metric in first["trail"] if kind == "anchor"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert all(torch.equal(first["end"][name], second["end"][name]) for name in first["end"])
    assert first["best"] == second["best"] == 5.0  # Trainer's own best goes by it too
    assert first["said"] == []
    assert len(second["said"]) == 5
    assert "`metric` 'eval_score' differs between ranks: rank 0 has 1.0, rank 1 has -1.0" in second["said"][0]
    assert "rank 1 has None" in second["said"][1]
    assert "rank 1 has nan" in second["said"][2]


def test_best_weights_are_those_of_rank_0s_metric_and_no_rank_waits_for_another(ranks):
    """Ranks that each went by their own metric would meet in different collectives, and wait for ever."""
    first, second = found(ranks, "best-weights")
    assert first["best"] == second["best"] == 5.0
    assert first["step"] == second["step"] == 15
    for run in (first, second):
        assert all(torch.equal(run["kept"][name], first["end"][name]) for name in first["end"])


def test_a_metric_that_rank_0_lacks_is_an_error_on_both(ranks):
    for run in found(ranks, "absent-on-first"):
        assert run["kind"] == "MetricError"
        assert "'eval_score' is not among" in run["text"]


def test_a_set_up_refused_on_one_rank_is_refused_on_both(ranks):
    for run in found(ranks, "refused-on-one"):
        assert run["kind"] == "ScopeError"
        assert run["text"].startswith("Rank 1 of 2 failed: `scope` 'no_such_layer'")


def test_an_anchor_that_one_rank_does_not_see_is_an_error_on_both(ranks):
    for run in found(ranks, "unseen-by-one"):
        assert run["kind"] == "AnchorFileError"
        assert run["text"].startswith("Rank 1 of 2 failed: ")
        assert "elsewhere/reset_anchor.safetensors" in run["text"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_lost_anchor_is_named_and_passed_over(ranks, mode):
    for run in found(ranks, f"missing-{mode}"):
        assert run["kind"] == "AnchorFileError"
        assert f"checkpoint-6/{run['lost']}" in run["text"]
        assert run["resumed_at"]  # `resume_from_checkpoint=True` took the whole one before


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_full_disk_is_an_error_on_both_and_the_last_whole_checkpoint_goes_on(ranks, small_disk, mode):
    if small_disk is None:
        pytest.skip("mounting a small tmpfs is not permitted here")
    for run in found(ranks, f"full-disk-{mode}"):
        assert run["kind"] == "AnchorFileError"
        assert "checkpoint-6/reset_anchor" in run["text"]
        assert "could not be written" in run["text"]
        assert "Free the disk" in run["text"]  # the cause is not always told: torch may hide it behind its own
        assert "ank 0 of 2 failed" in run["text"]
        assert run["same"]
        assert run["trails"][0] == run["trails"][1]


def test_the_plain_callback_resumes_under_ddp(ranks):
    for run in found(ranks, "plain-callback"):
        straight, resumed = run["ends"]
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
        assert run["events"][0] == run["events"][1]


def test_an_error_in_the_users_code_on_one_rank_ends_all_within_a_bounded_time(tmp_path):
    run = launch(HERE / "failures.py", tmp_path, "one-dies", timeout=120)
    assert run.status not in (0, None)
    assert "compute_metrics failed on purpose" in run.output
    assert "rank      : 1" in run.output  # the launcher's own report
