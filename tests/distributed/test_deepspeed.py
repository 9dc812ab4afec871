"""DeepSpeed ZeRO-1, -2 and -3 on two gloo processes, in an environment of its own."""

import pytest
import torch
from launch import HERE, deepspeed_python, launch, results

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

EXACT = [f"{stage}-{dtype}" for stage in ("z1", "z2", "z3", "z3_persistent") for dtype in ("fp32", "bf16")]
OFFLOADED = ["z2_offload-fp32", "z3_offload-fp32"]
RESUMED = ["z1-fp32", "z2-bf16", "z3-fp32", "z3_persistent-bf16", *OFFLOADED]


@pytest.fixture(scope="module")
def python():
    """The interpreter of DeepSpeed's environment, built at the first call."""
    return deepspeed_python()


@pytest.fixture(scope="module")
def ranks(python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    return results(launch(HERE / "zero.py", folder, python=python, timeout=480, CHECK_SECONDS="460"), folder)


def found(ranks, name):
    for rank, checks in enumerate(ranks):
        assert "error" not in checks[name], f"rank {rank}: {checks[name]['error']}"
    return [checks[name] for checks in ranks]


def difference(one, other, names):
    """Largest difference of weights, masters and moments of the named parameters."""
    keys = [key for key in one if key.split("/", 1)[1] in names]
    assert {key.split("/")[0] for key in keys} == {"weight", "master", "exp_avg", "exp_avg_sq"}
    return max((one[key] - other[key]).abs().max().item() for key in keys)


@pytest.mark.parametrize("config", EXACT + OFFLOADED)
def test_a_full_reset_restores_weights_masters_and_moments(ranks, config):
    for run in found(ranks, f"exact-{config}-all"):
        assert run["layout"] == "flat"
        assert difference(run["away"], run["at_anchor"], run["names"]) > 1e-3
        assert difference(run["back"], run["at_anchor"], run["names"]) == 0
        assert run["counts"][0] == run["counts"][1]
        assert run["losses"][0] == run["losses"][1] == run["swapped"]
        assert run["distance"] == 0


@pytest.mark.parametrize("config", EXACT + OFFLOADED)
def test_the_next_step_starts_from_the_anchor(ranks, config):
    """A naive reset of the weights alone looks right at an evaluation, and is undone by the next step."""
    for run in found(ranks, f"exact-{config}-all"):
        assert difference(run["next"], run["twin"], run["names"]) == 0
        assert difference(run["next"], run["at_anchor"], run["names"]) > 1e-3


@pytest.mark.parametrize("config", EXACT + OFFLOADED)
def test_a_partial_reset_restores_its_scope_and_nothing_else(ranks, config):
    for run in found(ranks, f"exact-{config}-head"):
        assert run["names"] == ["classifier.weight", "classifier.bias"]
        rest = {key.split("/", 1)[1] for key in run["away"]} - set(run["names"])
        assert difference(run["away"], run["at_anchor"], run["names"]) > 1e-4
        assert difference(run["back"], run["at_anchor"], run["names"]) == 0
        assert difference(run["back"], run["away"], rest) == 0
        before, after = run["counts"]  # one count for a whole partition: left alone
        assert after == [count + 1 for count in before]


@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("config", EXACT + OFFLOADED)
def test_a_reloaded_anchor_is_the_same(ranks, config, scope):
    for run in found(ranks, f"exact-{config}-{scope}"):
        assert difference(run["reloaded"], run["at_anchor"], run["names"]) == 0


@pytest.mark.parametrize("config", EXACT)
def test_distances_of_shares_add_up_to_that_of_the_masters(ranks, config):
    runs = found(ranks, f"exact-{config}-all")
    gaps = [runs[0]["away"][key] - runs[0]["at_anchor"][key] for key in runs[0]["away"] if key.startswith("master/")]
    whole = sum(gap.double().square().sum().item() for gap in gaps)
    assert sum(run["squared_distance"] for run in runs) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("config", RESUMED)
def test_resume_is_exact(ranks, config):
    runs = found(ranks, f"resume-{config}")
    assert runs[0]["trail"] == runs[1]["trail"]
    assert runs[0]["losses"] == runs[1]["losses"]
    for run in runs:
        assert run["layout"] == "DEEPSPEED"
        assert sum(kind == "reset" for kind, _, _ in run["trail"]) >= 3
        for step, (after_step, trail) in run["resumed"].items():
            assert trail == run["trail"]
            for later, live in after_step.items():
                straight = run["after_step"][later]
                assert later > step
                assert live.keys() == straight.keys()
                assert all(torch.equal(live[key], straight[key]) for key in live), (step, later)


@pytest.mark.parametrize("config", RESUMED)
def test_a_step_with_a_reset_issues_as_many_collectives_as_one_without(ranks, config):
    for run in found(ranks, f"collectives-{config}"):
        plain, (with_resets, trail) = run["plain"][0], run["reset"]
        assert sum(kind == "reset" for kind, _, _ in trail) >= 3
        assert all(sum(counts.values()) > 0 for counts in plain.values())
        assert with_resets == plain  # by operation and step, the steps after a reset too


def test_resets_decide_as_under_ddp(ranks):
    """ZeRO-1 in float32 and ZeRO-3 see the same losses, and the draws know nothing of the engine."""
    one, three = found(ranks, "resume-z1-fp32")[0], found(ranks, "resume-z3-fp32")[0]
    assert [(kind, step) for kind, step, _ in one["trail"]] == [(kind, step) for kind, step, _ in three["trail"]]


def test_what_cannot_be_right_is_refused_in_words(ranks):
    for said in found(ranks, "refusals"):
        assert "float32 masters that cannot be reached" in said["stage 0 in bf16"]
        assert "`zero_hpz_partition_size`" in said["hierarchical"]
        assert "NVMe" in said["nvme"]
        assert "offload_optimizer.device" in said["nvme"]
        assert "Pass `optimizer`" in said["no optimizer"]


@pytest.mark.parametrize("config", ["z2-fp32", "z3-fp32"])
def test_another_number_of_processes_is_refused_with_the_remedy(ranks, config):
    for run in found(ranks, f"other-world-{config}"):
        kind, text = run["raised"]
        assert kind == "AnchorFileError"
        assert "reset_anchor-rank0-of-3.safetensors" in text
        assert "written by 3 processes, and this run has 2" in text
        assert "resume with 3 processes" in text


@pytest.mark.parametrize("config", ["z2-fp32", "z3-fp32"])
def test_rows_are_remembered_on_all_ranks_alike_and_resume_exactly(ranks, config):
    one, other = ({run: _known(state) for run, state in rank.items()} for rank in found(ranks, f"rows-{config}"))
    assert (one["whole"]["memory.total.visits"] >= 1).all()
    assert int(one["whole"]["memory.total.visits"].sum()) == 11 * 8
    for state in (one["again"], other["whole"], other["again"]):
        assert state.keys() == one["whole"].keys() >= {"loss.targets", "memory.classes"}
        assert all(torch.equal(state[name], tensor) for name, tensor in one["whole"].items())


def _known(state):
    return {name: tensor.nan_to_num(-1) for name, tensor in state.items()}
