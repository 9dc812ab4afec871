"""The average in two gloo processes: a twin's at every step, evaluated, saved and taken up again as what it is."""

import pytest
import torch
from launch import HERE, deepspeed_python, launch, results

pytestmark = pytest.mark.distributed

CASES = [f"{mode}-{kind}" for mode in ("ddp", "fsdp") for kind in ("all", "head", "lora")]
ZERO = [*(f"z3-fp32-{kind}" for kind in ("all", "head", "lora")), "z2-bf16-all", "z3_persistent-bf16-all"]
BOTH = [*CASES, *(pytest.param(case, marks=pytest.mark.deepspeed) for case in ZERO)]


@pytest.fixture(scope="module")
def by_engine(tmp_path_factory):
    """Each launch happens once, and only if a test asks for it."""
    done = {}

    def run(zero):
        if zero not in done:
            folder = tmp_path_factory.mktemp("averages")
            more = {"python": deepspeed_python(), "ON_ZERO": "1"} if zero else {}
            done[zero] = results(launch(HERE / "averages.py", folder, timeout=420, **more), folder)
        return done[zero]

    return run


@pytest.fixture
def ranks(by_engine, request):
    case = request.param
    checks = by_engine(case in ZERO)
    for rank, found in enumerate(checks):
        assert "error" not in found[case], f"rank {rank}: {found[case]['error']}"
    return case, [found[case] for found in checks]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def tolerance(case):
    """bfloat16 keeps eight bits of each weight and of each activation."""
    return 2e-2 if "bf16" in case else 1e-5


@pytest.mark.parametrize("ranks", BOTH, indirect=True)
def test_each_ranks_share_is_the_twins_at_every_step(ranks):
    case, runs = ranks
    expected = {"ddp": "whole", "fsdp": "rows"}.get(case.split("-")[0], "flat")
    for run in runs:
        assert run["layout"] == expected
        assert run["differs"] == []
        assert sum(kind == "reset" for kind, _, _ in run["trail"]) >= 2
        assert sum(value.numel() for value in run["averages"][9].values()) > 0
        assert not same(run["averages"][1], run["after_step"][1])


@pytest.mark.parametrize("ranks", BOTH, indirect=True)
def test_the_average_is_evaluated_and_the_live_weights_come_back(ranks):
    _, runs = ranks
    for run in runs:
        assert run["moved"] == []
        for step in (3, 6, 9):
            evaluated, average = run["evaluated"][step], run["averages"][step]
            assert same(evaluated, {key: value.to(evaluated[key].dtype) for key, value in average.items()})


@pytest.mark.parametrize("ranks", BOTH, indirect=True)
def test_what_is_saved_and_finished_with_is_what_was_evaluated(ranks):
    case, runs = ranks
    for run in runs:
        in_shares = case.startswith("fsdp")  # the resume shows what is in them
        for step, loss in run["saved"].items():
            assert (loss is None) is in_shares
            if loss is not None:
                assert loss == pytest.approx(run["losses"][step], rel=tolerance(case)), step
        assert run["final_loss"] == pytest.approx(min(run["losses"].values()), rel=1e-6)
        finished, saved, _ = run["finished"]
        if saved is not None:
            assert saved == pytest.approx(finished, rel=tolerance(case))
    assert runs[0]["losses"] == runs[1]["losses"]


@pytest.mark.parametrize("ranks", BOTH, indirect=True)
def test_resume_is_exact(ranks):
    _, runs = ranks
    for run in runs:
        trail, differs, moved, after_step, averages = run["resumed"]
        assert trail == run["trail"]
        assert differs == moved == []
        assert sorted(after_step) == list(range(4, 10))
        for step in after_step:
            assert same(after_step[step], run["after_step"][step]), step
            assert same(averages[step], run["averages"][step]), step
