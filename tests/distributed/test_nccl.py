"""DDP, FSDP2 and FSDP1 on two GPUs, as on two gloo processes. Skipped in words where there are none."""

import pytest
import torch
from launch import HERE, launch, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "fsdp1"])
def test_nccl_resumes_exactly_and_talks_in_no_reset(tmp_path, mode):
    names = [f"{mode}-resume-all", f"{mode}-held", f"{mode}-collectives"]
    for checks in results(launch(HERE / "engines.py", tmp_path, *names, ON_GPU="1"), tmp_path):
        end, trail = checks[names[0]]["end"]
        for weights, resumed in checks[names[0]]["resumed"].values():
            assert resumed == trail
            assert all(torch.equal(weights[name], end[name]) for name in end)
        assert len({loss for loss, _ in checks[names[1]]["evaluated"].values()}) == 1
        runs = checks[names[2]]
        assert runs["reset"][0] == runs["plain"][0]
