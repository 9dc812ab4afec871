"""The loop over arms and seeds."""

from hf_reset.report.results import Results
from hf_reset.study.arms import PLAIN, RESET
from hf_reset.study.runs import run_arms


def test_runs_that_have_a_record_are_skipped(tmp_path):
    results = Results(tmp_path, recipe="r", configuration={}, environment={})
    results.add({"arm": "plain", "seed": 0, "x": 1})
    ran, said = [], []

    def run_one(arm, seed):
        ran.append((arm, seed))
        return {"x": 2}

    run_arms(results, [(PLAIN, 0), (RESET, 0)], run_one, say=said.append)
    assert ran == [(RESET, 0)]
    assert [r["x"] for r in results.records] == [1, 2]
    assert "skipped" in said[0]
