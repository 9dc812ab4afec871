"""Drift, diffusion and Péclet number where they are known, and the callback in a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch

from hf_reset.diagnostics import ExcursionDiffusionCallback
from hf_reset.diagnostics.diffusion import (
    drift_and_diffusion,
    noise_scale,
    noise_scale_of_strata,
    plot_diffusion,
)
from hf_reset.errors import ConfigError, DataError
from hf_reset.theory import langevin


def linear_regression(seed, *, excursions=20, steps=20, dimensions=5):
    """SGD on ½(θ·x − y)², x standard normal, from one anchor again and again, at a drift that hardly changes.

    At δ = θ − θ*, a sample's gradient has mean δ and, along δ, variance 2|δ|² + σ².

    Returns positions along −δ, and the true drift, diffusion and distance.
    """
    rng = np.random.default_rng(seed)
    rate, sigma, batch, length = 2e-3, 2.0, 4, 0.5
    delta = np.full(dimensions, length / math.sqrt(dimensions))
    walks = []
    for _ in range(excursions):
        theta, walk = delta.copy(), [0.0]
        for _ in range(steps):
            x = rng.normal(size=(batch, dimensions))
            residual = x @ theta - sigma * rng.normal(size=batch)
            theta = theta - rate * (residual[:, None] * x).mean(axis=0)
            walk.append(float((delta - theta) @ delta / length))
        walks.append(walk)
    truth = langevin.sgd(delta, 2 * delta**2 + sigma**2 + (length**2 - delta**2), rate, batch)
    # Along δ itself the covariance is not diagonal: Σ = (|δ|² + σ²) I + δ δᵀ.
    diffusion = rate**2 * (2 * length**2 + sigma**2) / (2 * batch)
    drift = truth.along(-delta)[0]
    return walks, drift, diffusion, length


def test_peclet_number_of_linear_regression_is_within_its_interval():
    hits = []
    for seed in range(50):
        walks, drift, diffusion, length = linear_regression(seed)
        found = drift_and_diffusion(walks)
        _, (low, high) = found.peclet(length)
        hits.append(low <= length * drift / (2 * diffusion) <= high)
        (v_low, v_high), (d_low, d_high) = found.intervals()
        assert v_high - v_low < 4 * drift
        assert d_high < 2 * d_low
    assert np.mean(hits) >= 0.8  # of 50 intervals of 90 %: 45 ± 2.1, and 40 are 2.4 standard errors off
    assert np.mean(hits) < 1  # and they are not so wide that none misses


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = np.zeros(3)
    for _ in range(400):
        walk = np.concatenate([[0.0], np.cumsum(rng.normal(0.1, 0.5, size=12))])
        found = drift_and_diffusion([walk])
        drift, diffusion = found.intervals()
        for i, (bounds, truth) in enumerate(
            zip((drift, diffusion, found.peclet(2.0)[1]), (0.1, 0.125, 2.0 * 0.1 / 0.25), strict=True)
        ):
            hits[i] += bounds[0] <= truth <= bounds[1]
    assert hits / 400 == pytest.approx(0.9, abs=3 * math.sqrt(0.09 / 400))


def test_a_lag_sees_the_diffusion_of_momentum():
    rng = np.random.default_rng(0)
    buffer, position, walk = 0.0, 0.0, [0.0]
    for _ in range(20_000):
        buffer = 0.9 * buffer + 0.3 + rng.normal(scale=0.5)
        position -= 0.1 * buffer
        walk.append(position)
    drift, diffusion = langevin.momentum(0.3, 0.25, 0.1, 1).along([1.0])
    long, short = drift_and_diffusion([walk], lag=200), drift_and_diffusion([walk])
    assert long.intervals()[0][0] < drift < long.intervals()[0][1]
    assert long.diffusion == pytest.approx(diffusion, rel=0.35)
    assert short.diffusion < 0.1 * diffusion  # successive steps go the same way


def test_increments_do_not_cross_excursions():
    found = drift_and_diffusion([[0, 1, 3], [0, 2, 3, 4], [0.0], [0, 1, 1, 2]])
    assert found.increments == 8
    assert found.drift == pytest.approx((3 + 4 + 2) / 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: drift_and_diffusion([[0, 1, 2]]), DataError, "2 increments of 1 steps say too little"),
        (lambda: drift_and_diffusion([]), DataError, "0 increments"),
        (lambda: drift_and_diffusion([list(range(20))]), DataError, "does not spread"),
        (lambda: drift_and_diffusion([[0, 1]], lag=0), ConfigError, "`lag` must be at least 1, got 0"),
        (
            lambda: drift_and_diffusion([[0, 1, 3] * 5]).peclet(0.0),
            ConfigError,
            r"`distance` must be above 0, got 0\.0",
        ),
        (lambda: noise_scale(1.0, 0.5, 8, 8), ConfigError, "`small` must be above 0 and below `large`"),
        (lambda: ExcursionDiffusionCallback(lag=0), ConfigError, "`lag` must be at least 1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_noise_scale_by_its_definition():
    # |G|² = 4, tr Σ = 100: what batches of 10 and 200 show on average.
    found = noise_scale(4 + 100 / 10, 4 + 100 / 200, 10, 200)
    assert (found.squared_norm, found.variance, found.scale) == pytest.approx((4, 100, 25))
    assert noise_scale(10.0, 0.1, 10, 200).scale == math.inf


def test_noise_scale_of_strata_is_that_of_the_mixture():
    rng = np.random.default_rng(0)
    size, counts, means = 4, (2400, 1600), np.array([[1.0, 0.0, 0.0], [-0.5, 1.0, 0.0]])
    parts = [mean + rng.normal(size=(n, 3)) for mean, n in zip(means, counts, strict=True)]
    batches = [part.reshape(-1, size, 3).mean(axis=1) for part in parts]
    small = [float((batch**2).sum(axis=1).mean()) for batch in batches]
    large = [float((part.mean(axis=0) ** 2).sum()) for part in parts]
    everyone = np.concatenate(parts)
    total = float((everyone.mean(axis=0) ** 2).sum())
    found = noise_scale_of_strata(small, large, counts, size, total)
    assert found.variance == pytest.approx(everyone.var(axis=0).sum(), rel=0.05)
    truth = 0.6 * means[0] + 0.4 * means[1]
    assert found.squared_norm == pytest.approx(truth @ truth, rel=0.1)


# ---------------------------------------------------------------------------------------------------- the callback


def run(folder, *callbacks, reset=None, **more):
    return tiny.plain_run(
        folder,
        callback=reset or tiny.callback(probability=0.3),
        more_callbacks=callbacks,
        lr_scheduler_type="constant",
        **{"eval_steps": 3, "max_steps": 40, "learning_rate": 1e-3, **more},
    )[0]


def test_positions_are_those_along_the_last_improvement(tmp_path):
    watch = ExcursionDiffusionCallback()
    reset = tiny.callback(probability=0.2)
    _, recorder = tiny.plain_run(
        tmp_path, callback=reset, more_callbacks=[watch], max_steps=40, learning_rate=1e-3, lr_scheduler_type="constant"
    )
    moves = tiny.steps_of(reset.events, "anchor")
    before, after = (flat(recorder.evaluated[step][1]) for step in moves[-2:])
    assert watch.distances[-1] == pytest.approx(float((after - before).norm()), rel=1e-5)
    assert len(watch.distances) == len(moves) - 1
    unit = (after - before) / (after - before).norm()
    begun = max([moves[-1], *(step + 1 for step in tiny.steps_of(reset.events, "reset"))])
    expected = [float((flat(recorder.after_step[s]) - after) @ unit) for s in range(begun + 1, 41)]
    assert watch.walks[-1] == pytest.approx([0.0, *expected], abs=1e-5)


def flat(weights):
    return torch.cat([weights[name].flatten() for name in weights])


def test_training_is_bit_identical_and_the_log_has_the_figures(tmp_path):
    plain, watched = run(tmp_path), run(tmp_path, ExcursionDiffusionCallback())
    assert tiny.equal(tiny.weights(plain.model), tiny.weights(watched.model))
    records = [record for record in watched.state.log_history if "diffusion/peclet" in record]
    assert records
    for record in records:
        for name in ("drift", "diffusion", "peclet"):
            assert record[f"diffusion/{name}_low"] < record[f"diffusion/{name}"] < record[f"diffusion/{name}_high"]
        assert record["diffusion/increments"] >= 8
        assert record["diffusion/distance"] > 0
    picture = plot_diffusion(watched.state.log_history, tmp_path / "diffusion.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_without_resets_there_is_nothing_to_follow(tmp_path):
    trainer, _ = tiny.plain_run(tmp_path, more_callbacks=[ExcursionDiffusionCallback()])
    assert not any("diffusion/peclet" in record for record in trainer.state.log_history)
    with pytest.raises(DataError, match="has no diffusion records"):
        plot_diffusion(trainer.state.log_history, tmp_path / "none.png")
