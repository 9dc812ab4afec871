# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-reset[recipes]"]
# ///
"""The paper's experiments, each a study of a minute on one core: small models on synthetic rows with wrong labels.

    python recipes/studies/paper.py                # all seven, then their figures
    python recipes/studies/paper.py --study a g    # the baseline against resets, and fixed against adaptive anchors

(a) probabilities, (b) batch size × noise, (c) scopes, (d) normalisation, (e) learning rate × optimizer × its state,
(f) theory against measurement, (g) anchors. Runs that the results files have are skipped. Anchors and checkpoints are
chosen by noisy validation loss; the clean test is read once, at the end. The settings were found with seeds from 100,
whose rows and class centres are others.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path("recipes/results/studies/paper")
RESET = {"probability": 0.02, "patience": 8}
PLAIN = {**RESET, "probability": 0.0}


def cells_a() -> Iterator[dict[str, Any]]:
    """Plain training, and probabilities around the paper's 0.001."""
    for probability in (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1):
        arm = f"r = {probability}" if probability else "plain"
        yield {"arm": arm, "training": {"steps": 3000}, "config": {**RESET, "probability": probability}}


def cells_b() -> Iterator[dict[str, Any]]:
    """Batch sizes × shares of wrong labels, plain and with resets."""
    for batch, noise in itertools.product((4, 16, 64), (0.0, 0.2, 0.4, 0.6)):
        for arm, config in (("plain", PLAIN), ("reset", RESET)):
            training = {"batch": batch, "steps": 1500}
            group = {"group": f"batch {batch}, noise {noise}", "batch": batch, "noise": noise}
            yield {**group, "arm": arm, "training": training, "config": config}


def cells_c() -> Iterator[dict[str, Any]]:
    """What a reset puts back: the last linear layer, the last K of three blocks with it, everything."""
    yield {"arm": "plain", "config": PLAIN}
    for scope in ("head", "last:1", "last:2", "all"):
        yield {"arm": f'scope "{scope}"', "config": {**RESET, "scope": scope}}


def cells_d() -> Iterator[dict[str, Any]]:
    """Normalisations, with the cosine of the gradient's correct and wrong part along the way."""
    for norm, (arm, config) in itertools.product(
        ("layer", "batch", "rms", "none"), (("plain", PLAIN), ("reset", RESET))
    ):
        yield {"group": norm, "arm": arm, "norm": norm, "watch": True, "training": {"steps": 1500}, "config": config}


def cells_e() -> Iterator[dict[str, Any]]:
    """Optimizers × learning rates, plain and with resets, whose optimizer state is restored, zeroed or kept."""
    rates = {"sgd": (0.03, 0.1, 0.3), "momentum": (0.003, 0.01, 0.03), "adamw": (0.0005, 0.001, 0.003)}
    for optimizer, of_optimizer in rates.items():
        for rate in of_optimizer:
            training = {"optimizer": optimizer, "rate": rate, "steps": 1200}
            group = {"group": f"{optimizer}, {rate}", "optimizer": optimizer, "training": training}
            yield {**group, "arm": "plain", "config": PLAIN}
            for state in ("restore",) if optimizer == "sgd" else ("restore", "zero", "keep"):
                yield {**group, "arm": state, "config": {**RESET, "optimizer_state": state}}


def cells_f() -> Iterator[dict[str, Any]]:
    """Times to a target: of a linear classifier at several Péclet numbers, and of a small transformer."""
    for noise in (0.5, 0.48, 0.45, 0.4):
        yield {"arm": f"linear classifier, {round(100 * noise)} % wrong", "linear": {"noise": noise}}
    training = {"optimizer": "adamw", "rate": 0.002, "steps": 400}
    yield {"arm": "transformer", "training": training, "every": 10, "config": PLAIN}


def cells_g() -> Iterator[dict[str, Any]]:
    """The anchor: moving on, staying, and taken only when wrong labels are being learnt."""
    yield {"arm": "plain", "config": PLAIN}
    for anchor in ("best", "fixed"):
        yield {"arm": f'anchor "{anchor}"', "config": {**RESET, "anchor": anchor}}
    for anchor, step in (("fixed", 300), ("fixed", 600), ("fixed", 1200), ("best", 600)):
        config = {**RESET, "anchor": anchor, "patience": 0}
        yield {"arm": f'"{anchor}", from step {step}', "training": {"observe_from": step}, "config": config}


STUDIES = {"a": cells_a, "b": cells_b, "c": cells_c, "d": cells_d, "e": cells_e, "f": cells_f, "g": cells_g}


def main(argv: list[str] | None = None) -> None:
    """Run what the results files lack, and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", nargs="+", choices=sorted(STUDIES), default=list("acgefbd"), help="which of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files and figures")
    parser.add_argument("--draw", action="store_true", help="run nothing, draw the figures anew")
    options = parser.parse_args(argv)
    import torch

    from hf_reset.report.paper import draw
    from hf_reset.study.cells import complete

    torch.set_num_threads(1)
    for study in options.study:
        path = options.results / f"{study}.json"
        if not options.draw:
            cells = [{**cell, "seed": seed} for seed in options.seeds for cell in STUDIES[study]()]
            complete(path, cells, lambda cell: rounded(carry_out(cell)))
        print(draw(study, json.loads(path.read_text(encoding="utf-8"))["records"], path.with_suffix(".png")))


def carry_out(one: dict[str, Any]) -> dict[str, Any]:
    """One run of one cell."""
    if "linear" in one:
        return linear(one)
    import torch

    from hf_reset.config import ResetConfig
    from hf_reset.study.small import SmallNet, SmallTransformer, Training, bags, clusters, parts_of_risk, run

    seed, noise = one["seed"], one.get("noise", 0.4)
    torch.manual_seed(seed)
    if one["arm"] == "transformer":
        return transformer(one, SmallTransformer(), bags(seed, noise=noise))
    model, splits = SmallNet(one.get("norm", "layer")), clusters(seed, noise=noise)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def parts(model: torch.nn.Module, step: int) -> dict[str, Any]:
        found = parts_of_risk(model, splits.train, start)
        return {name: getattr(found, name) for name in ("cosine", "correct_norm", "wrong_norm")}

    training, config = Training(**one.get("training", {})), ResetConfig(**one["config"])
    return run(model, splits, training, config, seed, watch=parts if one.get("watch") else None)


def linear(one: dict[str, Any]) -> dict[str, Any]:
    """The linear classifier's times, each probability a power of two around the best without drift."""
    from hf_reset.study.passages import LinearWalk, linear_record

    walk = LinearWalk(**one["linear"])
    probabilities = [0.005 * 2.0**power for power in range(-4, 4)]
    if walk.noise < 0.5:
        probabilities = [0.0, *probabilities]
    return linear_record(walk, probabilities, walkers=600, seed=one["seed"])


def transformer(one: dict[str, Any], model: Any, splits: Any) -> dict[str, Any]:
    """Plain training up to its best validation, and then passages from there."""
    from dataclasses import replace

    from hf_reset.anchor.store import AnchorStore
    from hf_reset.study.passages import passage_record
    from hf_reset.study.small import Training, batches, noisy_loss, take_step

    training = Training(**one["training"])
    optimizer, draw = training.of(model), batches(len(splits.train.given), training.batch, one["seed"])
    anchor, lowest = AnchorStore(model, optimizer), float("inf")
    for step in range(training.steps):
        take_step(model, optimizer, splits.train, draw())
        if (step + 1) % training.every == 0 and (loss := noisy_loss(model, splits.validation)) < lowest:
            lowest = loss
            anchor.snapshot()
    return passage_record(
        model,
        splits,
        replace(training, every=one["every"]),
        anchor,
        optimizer,
        [0.005, 0.01, 0.02, 0.05],
        free=30,
        repeats=20,
        horizon=250,
        seed=one["seed"],
    )


def rounded(value: Any) -> Any:
    """Floats to five digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
