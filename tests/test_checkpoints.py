"""Which checkpoints are whole."""

import json

import pytest
import torch
from tiny import bert

from hf_reset import AnchorStore, last_whole_checkpoint
from hf_reset.planner.excursions import EVENTS
from hf_reset.training.checkpoints import anchor_file, is_whole

TRAIL = [{"kind": "anchor", "step": 1}]


def checkpoint(directory, *, trail=TRAIL, ranks=1, sharded=False):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "trainer_state.json").write_text(
        json.dumps({"log_history": [], "stateful_callbacks": {EVENTS: trail}})
    )
    anchor = AnchorStore(bert())
    anchor.snapshot()
    for rank in range(ranks):
        name = f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth"
        torch.save({"cpu": torch.random.get_rng_state()}, directory / name)
        if trail and (sharded or rank == 0):
            place = anchor_file(directory, "flat" if sharded else "whole", rank=rank, world_size=ranks)
            anchor.save(place, {"world_size": ranks})
    return directory


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_checkpoint(tmp_path, ranks, sharded):
    assert is_whole(checkpoint(tmp_path / "c", ranks=ranks, sharded=sharded), world_size=ranks)


@pytest.mark.parametrize(
    "breaking",
    [
        lambda c: (c / "trainer_state.json").unlink(),
        lambda c: truncate(c / "trainer_state.json"),
        lambda c: (c / "rng_state_1.pth").unlink(),
        lambda c: truncate(c / "rng_state_1.pth"),
        lambda c: anchor_file(c, "flat", rank=1, world_size=2).unlink(),
        lambda c: truncate(anchor_file(c, "flat", rank=1, world_size=2)),
        lambda c: [f.unlink() for f in c.glob("reset_anchor*")],
    ],
)
def test_any_missing_or_truncated_file_is_seen(tmp_path, breaking):
    directory = checkpoint(tmp_path / "c", ranks=2, sharded=True)
    breaking(directory)
    assert not is_whole(directory, world_size=2)


def test_more_processes_than_wrote_it_may_take_it_up(tmp_path):
    directory = checkpoint(tmp_path / "c", ranks=2)
    assert is_whole(directory, world_size=4)
    (directory / "rng_state_1.pth").unlink()
    assert not is_whole(directory, world_size=4)


def test_a_run_without_an_anchor_yet_needs_no_anchor_file(tmp_path):
    assert is_whole(checkpoint(tmp_path / "c", trail=[]))


def test_the_newest_whole_one_by_number(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for number in (9, 10, 100):
        checkpoint(tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-7.bak").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    truncate(tmp_path / "checkpoint-100" / "reset_anchor.safetensors")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
