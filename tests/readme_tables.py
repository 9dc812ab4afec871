"""Render the tables of all READMEs from the committed result files: `python tests/readme_tables.py` writes them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from scripts import load_script

from hf_reset.report import classification, instructions, paper
from hf_reset.report.best_of import settled_table
from hf_reset.report.comparison import (
    cells_table,
    choices_table,
    comparison_table,
    headline_table,
    last_weights_table,
    settings_of,
    suspects_table,
)
from hf_reset.report.comparison_figure import plot_comparison
from hf_reset.report.results import read_results
from hf_reset.report.rivals import best_rivals_table, rivals_table
from hf_reset.report.tables import RESETS, Column, markdown_table, summary_table
from hf_reset.study.comparison import Plan, read_records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"
# With what was drawn before, up to the end mark, and never across the next table's mark.
_BLOCK = re.compile(r"<!-- table: (\w+) -->\n(?:(?:(?!<!-- table:).)*?<!-- end -->\n)?", re.DOTALL)


def is_noisy(setting: str) -> bool:
    """Whether at least 40 % of a setting's labels were made wrong, at random or in pairs."""
    return setting.endswith(("40", "60")) and "instance" not in setting


OURS = ["reset + refine + ema", "reset + refine + ema + gce"]
ABLATIONS = ["refine + ema", "reset + refine", "reset", "reset + refine + ema, by eval_loss"]  # of the first of ours

TAKEN = [
    "reset + refine + ema + gce, q 0.5",
    "gce, q 0.9",
    "ema, decay 0.995",
    "elr, λ 7",
]  # of "settled", where not used

TRUSTED = [  # what knows true labels of the validation rows
    "plain, clean labels choose",
    "clean validation rows",
    "noisy rows, then clean ones",
]


def settings(records: list[dict], *, noisy: bool = True) -> list[str]:
    """The settings of which at least 40 % of the labels were made wrong; or the others, without those of a fifth."""
    return [one for one in settings_of(records) if is_noisy(one) == noisy and not one.endswith("20")]


def of_a_fifth(records: list[dict]) -> list[str]:
    """The settings of which 20 % of the labels were made wrong."""
    return [setting for setting in settings_of(records) if setting.endswith("20")]


def of_arms(records: list[dict], *arms: str) -> list[dict]:
    """The records of some methods."""
    return [record for record in records if record["arm"] in arms]


def runs_of(records: list[dict]) -> set[tuple[str, int]]:
    """Setting and seed of each record."""
    return {(record["setting"]["name"], record["seed"]) for record in records}


def of_runs(records: list[dict], runs: set[tuple[str, int]]) -> list[dict]:
    """The records of some settings and seeds."""
    return [record for record in records if (record["setting"]["name"], record["seed"]) in runs]


def taken_table(records: list[dict]) -> str:
    """What noisy validation took elsewhere beside what the comparison has, on the columns and seeds that have both."""
    chosen = of_arms(records, "plain", *TAKEN, *(arm.partition(", ")[0] for arm in TAKEN))
    return comparison_table(of_runs(chosen, runs_of(of_arms(records, *TAKEN))))


def trusted_table(records: list[dict]) -> str:
    """What true labels of the validation rows are worth, on the columns and seeds where each use of them was run."""
    shared = set.intersection(*(runs_of(of_arms(records, arm)) for arm in TRUSTED))
    return cells_table(of_runs(of_arms(records, "plain", OURS[1], *TRUSTED), shared))


SAMPLES = 4  # of the generated responses shown
PRETRAINED = [  # of a language model that is worth generating with
    Column("test_loss_last", "clean test loss, last"),
    Column("test_loss_best", "clean test loss, best"),
    Column("test_token_accuracy_best", "token accuracy, best"),
    Column("rouge_l_best", "ROUGE-L of 8, best"),
    Column("response_memory_last", "memory of wrong responses, last"),
    Column("suspects_auroc", "suspects' AUROC"),
    RESETS,
]

# The tables of the comparison, by their name in a README.
STUDY = {
    "comparison": lambda records: comparison_table(records, settings(records)),
    "comparison_other": lambda records: comparison_table(records, settings(records, noisy=False)),
    "comparison_taken": taken_table,
    "comparison_fifth": lambda records: comparison_table(records, of_a_fifth(records)),
    "comparison_rivals": lambda records: rivals_table(records, OURS[1], settings(records)),
    "comparison_best_rivals": lambda records: best_rivals_table(records, OURS[1], settings(records)),
    "comparison_ablations": lambda records: rivals_table(of_arms(records, "plain", OURS[0], *ABLATIONS), OURS[0]),
    "comparison_last": lambda records: last_weights_table(records, settings(records)),
    "comparison_trusted": trusted_table,
    "comparison_cells": lambda records: cells_table(of_arms(records, "plain", *OURS, "ema", "elr", "gce")),
    "headline": lambda records: headline_table(records, settings(records), OURS),
    "choices": choices_table,
    "suspects": lambda records: suspects_table(of_arms(records, "plain", *OURS)),
    "suspects_cleanlab": lambda records: suspects_table(
        of_arms(records, "plain", *OURS, "cleanlab"), settings_of(of_arms(records, "cleanlab"))
    ),
}


def render(readme: str) -> str:
    """The README with each table drawn anew."""
    return _BLOCK.sub(lambda block: f"<!-- table: {block[1]} -->\n{table(block[1])}\n<!-- end -->\n", readme)


def table(name: str) -> str:
    """The table of one result file, or of the folder of a study."""
    if name in STUDY:
        return STUDY[name](read_records(RESULTS / "studies" / "comparison"))
    if name == "sst2":
        return comparison_table(read_records(RESULTS / "studies" / name))
    if name == "auto":
        return paper.auto_table(read_records(RESULTS / "studies" / "auto"))
    if name == "racing_clock":
        return paper.auto_table(read_records(RESULTS / "studies" / name), seconds=True)
    if name == "settled":
        arms = Plan.read(ROOT / "recipes" / "studies" / "plans" / "settled.yaml").arms
        return settled_table(read_records(RESULTS / "studies" / name), [arm.name for arm in arms])
    if name.startswith("paper_"):
        study = name.removeprefix("paper_")
        path = RESULTS / "studies" / "paper" / f"{study}.json"
        return paper.table(study, json.loads(path.read_text(encoding="utf-8"))["records"])
    if name in ("never_locked_in", "judges", "prompts"):
        study = load_script(f"studies/{name}.py")
        return study.table(json.loads((RESULTS / "studies" / f"{name}.json").read_text(encoding="utf-8"))["records"])
    if name == "racing":
        return _racing(json.loads((RESULTS / "studies" / "racing.json").read_text(encoding="utf-8"))["records"])
    if name.endswith("_samples"):
        records = read_results(RESULTS / f"{name.removesuffix('_samples')}.json")["records"]
        return instructions.samples_table([{**one, "samples": one["samples"][:SAMPLES]} for one in records])
    path = RESULTS / f"{name}.json"
    path = path if path.is_file() else RESULTS / "benchmarks" / path.name
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("benchmark") == "overhead":
        return _overhead(result)
    if result.get("benchmark") == "resets":
        return _resets(result)
    if result.get("benchmark") == "survival":
        return _survival(result)
    if result.get("benchmark") == "exactness":
        return _exactness(result)
    columns = {"text_classification": classification.README_COLUMNS, "instruction_tuning": instructions.README_COLUMNS}
    chosen = PRETRAINED if name.startswith("instruction_smollm2") else columns[result["recipe"]]
    return summary_table(read_results(path)["records"], chosen)


def _overhead(result: dict) -> str:
    names = {
        "callback_off": "callback, probability 0",
        "callback": "callback",
        "trainer": "ResetTrainer",
    }
    rows = [
        [
            names[arm],
            f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})",
            f"{result['hooks_in_stock_steps'][arm]:.5f}",
        ]
        for arm, ratio in result["step_ratio_to_stock"].items()
    ]
    heading = ["arm", "median step, of the stock Trainer's (lowest to highest round)", "in its own hooks, in steps"]
    steps = markdown_table(heading, rows)
    rows = [
        [
            f"`{scope}`",
            f"{cost['anchor_bytes'] / cost['model_bytes']:.3f}",
            f"{cost['snapshot_steps']:.3f}",
            f"{cost['restore_steps']:.3f}",
        ]
        for scope, cost in result["anchor"].items()
    ]
    heading = ["scope", "anchor, of the weights' bytes (with optimizer state)", "snapshot, in steps", "reset, in steps"]
    tables = [steps, markdown_table(heading, rows)]
    beside = [[f"`{name}`", f"{100 * share:.1f} %"] for name, share in result.get("diagnostics_steps", {}).items()]
    if "row_memory" in result:
        memory = result["row_memory"]
        share = memory["numbering_steps"] + memory["visit_and_share_steps"]
        beside.insert(0, ["row memory (`ResetTrainer`)", f"{100 * share:.1f} %"])
    if beside:
        tables.append(markdown_table(["beside a step", "of a stock step, on average"], beside))
    return "\n\n".join(tables)


def _resets(result: dict) -> str:
    """A reset by size of the model, beside other ways back and averages; then by scope."""
    names = {
        "reset": "reset",
        "snapshot": "snapshot",
        "load_state_dict": "`load_state_dict` of a deep copy",
        "reload": "checkpoint from disk",
        "bema": "TRL's BEMA update",
        "average": "`ema_decay` update",
    }

    def shown(ratio: dict, seconds: dict) -> str:
        return f"{ratio['median']:.2f} × ({1000 * seconds['median']:.3g} ms)"

    rows = [
        [
            f"{case['parameters'] / 1e6:.0f} M, {case['dtype']}",
            f"{1000 * case['seconds']['copy']['median']:.3g} ms",
            *(shown(case["to_copy"][way], case["seconds"][way]) for way in names),
        ]
        for case in result["cases"]
        if case["scope"] == "all"
    ]
    whole = markdown_table(["model", "bare fused copy", *names.values()], rows)
    scopes = [scope for scope in dict.fromkeys(case["scope"] for case in result["cases"]) if scope != "all"]
    cases = {(case["size"], case["dtype"], case["scope"]): case for case in result["cases"]}
    rows = []
    for size, dtype in dict.fromkeys((size, dtype) for size, dtype, _ in cases):
        parts = [cases[size, dtype, scope] for scope in scopes]
        resets = [
            f"{1000 * case['seconds']['reset']['median']:.3g} ms ({case['anchor_bytes'] / 1e6:.3g} MB)"
            for case in parts
        ]
        rows.append([f"{cases[size, dtype, 'all']['parameters'] / 1e6:.0f} M, {dtype}", *resets])
    return f"{whole}\n\n{markdown_table(['model', *(f'reset `{scope}`' for scope in scopes)], rows)}"


def _racing(records: list[dict]) -> str:
    rows = [
        [
            record["setting"],
            f"{record['evaluations']} ({record['put_back']}), {record['new_anchors']:.0f}",
            f"{record['median_margin']:+.1f}",
            f"{record['agreed']} of {record['clear']}",
            f"{record['foreseen']:.2f}",
            f"{record['factor']:.1f}",
            f"{record['factor_clearly_worse']:.1f}",
            f"{record['last_anchor']:.4f} ({record['best']:.4f})",
        ]
        for record in records
    ]
    heading = [
        "setting",
        "evaluations (put back), new anchors",
        "median margin",
        "decided as in full",
        "foreseen",
        "fewer rows",
        "fewer rows, clearly worse",
        "last anchor's loss (best of the run)",
    ]
    return markdown_table(heading, rows)


def _survival(result: dict) -> str:
    kills = Counter((kill["mode"], kill["phase"]) for kill in result["kills"])
    phases = list(dict.fromkeys(phase for _, phase in sorted(kills)))
    rows = []
    for mode in dict.fromkeys(life["mode"] for life in result["lives"]):
        lives = [life["identical"] for life in result["lives"] if life["mode"] == mode]
        rows.append([mode, *(str(kills[mode, phase]) for phase in phases), f"{sum(lives)} of {len(lives)}"])
    return markdown_table(["", *(f"killed in {phase}" for phase in phases), "runs that ended bit-identical"], rows)


def _exactness(result: dict) -> str:
    """A row a package: which of its optimizers are exact, and which are refused, wholly or in one use."""
    rows = []
    for package, version in dict.fromkeys((one["package"], one["version"]) for one in result["cases"]):
        exact, refused = [], []
        for one in result["cases"]:
            uses = [use for use in result["proofs"] if one[use] != "exact"]
            if one["package"] == package and len(uses) < len(result["proofs"]):
                exact.append(one["name"] + (f" (but {', '.join(uses)}: refused)" if uses else ""))
            elif one["package"] == package:
                refused.append(one["name"])
        rows.append([f"{package} {version}", ", ".join(exact) or "–", ", ".join(refused) or "–"])
    return markdown_table(["package", "exact", "refused when training begins"], rows)


def draw() -> None:
    """The picture of the columns that the headline is of, of the methods that most of them have."""
    folder = RESULTS / "studies" / "comparison"
    records = read_records(folder)
    chosen = settings(records)
    noisy = [record for record in records if record["setting"]["name"] in chosen]
    plot_comparison(noisy, folder / "noisy.png", share=0.5)


if __name__ == "__main__":
    draw()
    for path in (ROOT / "README.md", *(ROOT / "recipes").glob("*/README.md")):
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
