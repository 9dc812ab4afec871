"""DDP, FSDP2 and FSDP1 in two and four gloo processes: they train alike, agree, resume, and never talk in a reset."""

import pytest
import torch
from engines import trajectory
from launch import HERE, launch, results

pytestmark = pytest.mark.distributed

MODES = ("ddp", "fsdp", "fsdp1")
OF_TWO = ("trajectory", "resume-all", "resume-head", "held", "held-bf16", "swapped", "collectives")
RESHARDED = ("ddp", "fsdp")  # FSDP1's shares are flat, and belong to one number of processes


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    names = [f"{mode}-{check}" for mode in MODES for check in ("trajectory", "saved")]
    return folder, results(launch(HERE / "engines.py", folder, *names, processes=4), folder, processes=4)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, of_four):
    folder = tmp_path_factory.mktemp("two")
    names = [f"{mode}-{check}" for mode in MODES for check in OF_TWO]
    names += [f"{mode}-taken-up" for mode in RESHARDED]
    names += ["ddp-auto", "fsdp-unwatched", "fsdp1-flat", "fsdp1-lost-state", "fsdp1-other-world"]
    more = {"timeout": 480, "CHECK_SECONDS": "460"}  # minutes of work where other work shares the cores
    return results(launch(HERE / "engines.py", folder, *names, OF_FOUR=str(of_four[0]), **more), folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trajectory("ddp", tmp_path_factory.mktemp("one"))


def found(ranks, name):
    """What a check gave on rank 0, once it is known to have passed on all."""
    for rank, checks in enumerate(ranks):
        assert "error" not in checks[name], f"rank {rank}: {checks[name]['error']}"
    return ranks[0][name]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gaps(one, other):
    """Differences of all weights after all steps, as one vector."""
    pairs = [(one[step][name], other[step][name]) for step in one for name in one[step]]
    return torch.cat([(a - b).flatten() for a, b in pairs]).double()


def decisions(run):
    return [(event["kind"], event["step"], event["anchor_step"]) for event in run["events"]]


def test_each_mode_runs_on_its_own_engine(of_two, of_four):
    for ranks in (of_two, of_four[1]):
        assert found(ranks, "ddp-trajectory")["layout"] == "DistributedDataParallel"
        assert found(ranks, "fsdp-trajectory")["layout"] == "FSDP2"
        assert found(ranks, "fsdp1-trajectory")["layout"] == "FullyShardedDataParallel"


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_several_processes_train_as_one_with_the_same_global_batch(of_two, of_four, alone, mode, processes):
    run = found(of_two if processes == 2 else of_four[1], f"{mode}-trajectory")
    assert decisions(run) == decisions(alone)
    assert [event["kind"] for event in run["events"]].count("reset") >= 3
    gap = gaps(run["after_step"], alone["after_step"])
    moved = gaps({15: alone["after_step"][15]}, {15: alone["after_step"][1]}).abs().max()
    assert gap.abs().max() < 1e-3 * moved  # rounding, and nothing near a step
    assert gap.mean().abs() < 0.1 * gap.std()  # to no side


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("mode", ["fsdp", "fsdp1"])
def test_fsdp_equals_ddp(of_two, of_four, mode, processes):
    ranks = of_two if processes == 2 else of_four[1]
    ddp, fsdp = found(ranks, "ddp-trajectory"), found(ranks, f"{mode}-trajectory")
    assert decisions(ddp) == decisions(fsdp)
    if processes == 2:  # a sum of two has one order
        assert all(same(ddp["after_step"][step], fsdp["after_step"][step]) for step in ddp["after_step"])
    assert gaps(ddp["after_step"], fsdp["after_step"]).abs().max() < 1e-6
    assert fsdp["nbytes"] < ddp["nbytes"] * (1 / processes + 0.05)  # a rank keeps its share only


@pytest.mark.parametrize("mode", MODES)
def test_ranks_agree_on_resets_anchors_and_weights(of_two, of_four, mode):
    for ranks in (of_two, of_four[1]):
        first, *others = [checks[f"{mode}-trajectory"] for checks in ranks]
        for other in others:
            assert decisions(first) == decisions(other)
            assert [e["metric"] for e in first["events"]] == [e["metric"] for e in other["events"]]
            assert same(first["final"], other["final"])


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_leaves_what_was_evaluated_at_the_anchor(of_two, mode):
    run = found(of_two, f"{mode}-trajectory")
    for event in run["events"]:
        if event["kind"] == "reset":
            assert same(run["after_step"][event["step"] + 1], run["evaluated"][event["anchor_step"]][1])


@pytest.mark.parametrize("mode", MODES)
def test_training_ends_on_the_anchor(of_two, mode):
    run = found(of_two, f"{mode}-trajectory")
    assert same(run["final"], run["evaluated"][run["events"][-1]["anchor_step"]][1])


@pytest.mark.parametrize("check", ["held", "held-bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_evaluated_after_every_reset_the_forward_reads_the_anchor(of_two, mode, check):
    """FSDP keeps the root gathered after an evaluation: a reset must neither fail on it nor be hidden by it."""
    run = found(of_two, f"{mode}-{check}")
    losses = {loss for loss, _ in run["evaluated"].values()}
    assert len(run["evaluated"]) == 6
    assert len(losses) == 1
    assert [event["kind"] for event in run["events"]] == ["anchor"] + ["reset"] * 5
    anchor = run["evaluated"][1][1]
    assert all(same(weights, anchor) for _, weights in run["evaluated"].values())
    # What the forward read of FSDP2's gathered root is in bf16; the weights at the end are in float32.
    assert same({name: weight.to(anchor[name].dtype) for name, weight in run["final"].items()}, anchor)


@pytest.mark.parametrize("mode", MODES)
def test_swapped_shows_the_anchor_and_gives_the_weights_back(of_two, mode):
    run = found(of_two, f"{mode}-swapped")
    anchor_step = {e["step"]: e["anchor_step"] for e in run["events"]}
    assert len(run["seen"]) >= 3
    at = None
    for step, before, inside, after, weights in run["seen"]:
        at = max((a for s, a in anchor_step.items() if s < step), default=at)
        assert torch.equal(before, after)
        assert not torch.equal(before, inside)
        assert same(weights, run["evaluated"][at][1])


@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact_at_each_checkpoint(of_two, mode, scope):
    for checks in of_two:
        run = found(of_two, f"{mode}-resume-{scope}")
        end, trail = checks[f"{mode}-resume-{scope}"]["end"]
        assert sum(kind == "reset" for kind, _, _ in trail) >= 3
        for step, (weights, resumed) in run["resumed"].items():
            assert resumed == trail, step
            assert same(weights, end), step
        assert not same(run["other"], end)  # another seed of resets: were the resets not resumed, it would show


def test_ranks_choose_the_same_probability_and_a_resumed_run_repeats_it(of_two):
    (whole_events, whole_plan), (resumed_events, resumed_plan) = found(of_two, "ddp-auto")["runs"]
    assert [event["kind"] for event in whole_events].count("plan") >= 1
    assert whole_plan.counts.excursions >= 3
    assert (resumed_events, resumed_plan) == (whole_events, whole_plan)
    assert of_two[1]["ddp-auto"]["runs"] == of_two[0]["ddp-auto"]["runs"]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_a_reset_issues_as_many_collectives_as_one_without(of_two, mode):
    for checks in of_two:
        runs = checks[f"{mode}-collectives"]
        plain, (with_resets, trail) = runs["plain"][0], runs["reset"]
        assert sum(kind == "reset" for kind, _, _ in trail) >= 3
        assert all(sum(counts.values()) > 0 for counts in plain.values())
        assert with_resets == plain  # by operation and step, the steps after a reset too
        expected = "c10d::allreduce_" if mode == "ddp" else "c10d::_reduce_scatter_base_"
        assert all(counts[expected] > 0 for counts in plain.values())


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_skipped_step_issues_none(of_two, mode):
    steps, trail = found(of_two, f"{mode}-collectives")["skipping"]
    assert all(steps[step] == {} for kind, step, _ in trail if kind == "reset")


@pytest.mark.parametrize("mode", RESHARDED)
def test_another_number_of_processes_takes_up_the_same_anchor(of_two, of_four, mode):
    four, two = found(of_four[1], f"{mode}-saved"), found(of_two, f"{mode}-taken-up")
    assert any(key.startswith("optimizer/exp_avg/") for key in four["anchor"])
    assert same({k: v.float() for k, v in four["anchor"].items()}, {k: v.float() for k, v in two["anchor"].items()})
    assert all(directory.endswith("checkpoint-6") for directory in four["newest"].values())
    assert two["trail"][: len(four["trail"])] == four["trail"]
    assert any(kind == "reset" and step >= 6 for kind, step, _ in two["trail"])
    (said,) = two["said"]
    assert "Resuming with 2 processes a run of 4" in said
    assert "eval_loss" in said


def test_fsdp1_refuses_another_number_of_processes_with_the_remedy(of_two):
    for rank, checks in enumerate(of_two):
        assert checks["fsdp1-other-world"]["kind"] == "AnchorFileError"
        refused = checks["fsdp1-other-world"]["text"]
        assert "written by 4 processes, and this run has 2" in refused, rank
        assert "resume with 4 processes" in refused


def test_diagnostics_of_whole_weights_refuse_shares_in_words(of_two):
    for checks in of_two:
        assert checks["fsdp-unwatched"]["kind"] == "UnsupportedError"
        assert "ExcursionDiffusionCallback needs the weights whole" in checks["fsdp-unwatched"]["text"]


def test_a_flat_parameter_is_reset_whole(of_two):
    run = found(of_two, "fsdp1-flat")
    assert run["layouts"] == [True, False]
    after_step, evaluated, events = run["flat"]
    assert [event["kind"] for event in events].count("reset") >= 3
    for event in events:
        if event["kind"] == "reset":
            reset, anchor = after_step[event["step"] + 1], evaluated[event["anchor_step"]][1]
            assert reset.keys() == run["original"][0][1].keys()
            assert same(reset, anchor)
    assert all(same(after_step[step], run["original"][0][step]) for step in after_step)


def test_a_part_of_a_flat_parameter_is_refused_in_words(of_two):
    for checks in of_two:
        assert checks["fsdp1-flat"]["refused"]["kind"] == "UnsupportedError"
        refused = checks["fsdp1-flat"]["refused"]["text"]
        assert "`scope` 'head' is not supported under FSDP1 without original parameters" in refused
        assert "fsdp_use_orig_params: true" in refused


def test_fsdp1_refuses_to_go_on_without_its_optimizer_state(of_two):
    for checks in of_two:
        assert checks["fsdp1-lost-state"]["kind"] == "UnsupportedError"
        refused = checks["fsdp1-lost-state"]["text"]
        assert "The state of AdamW was not loaded from the checkpoint" in refused
        assert "fsdp_state_dict_type: FULL_STATE_DICT" in refused
