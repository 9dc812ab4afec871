"""What must hold whatever else changes: the callback against a plain loop, and against the stock Trainer."""

import pytest
import torch
from tiny import TRAIN, VALIDATION, bert, callback, equal, plain_run, reset_run, steps_of, weights
from transformers.optimization import get_linear_schedule_with_warmup

from hf_reset import ResetConfig
from hf_reset.policy import uniform

SAVING = {"save_strategy": "steps", "save_steps": 3}
STEPS, EVERY, SEED, R, LR = 15, 3, 7, 0.4, 5e-3


def batch(rows, start, size):
    picked = [rows[i % len(rows)] for i in range(start, start + size)]
    return {key: torch.tensor([row[key] for row in picked]) for key in ("input_ids", "attention_mask", "labels")}


def reference_twin():
    """Stochastic resetting in plain PyTorch: no Trainer, no AnchorStore, nothing fused.

    Returns the weights after each step, the steps that were reset, and the anchor's step.
    """
    model = bert(dropout=0)
    decayed = {"params": [p for n, p in model.named_parameters()], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed], lr=LR)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    best, anchor, history, resets, where = float("inf"), None, {}, [], None
    for step in range(STEPS):
        model.train()
        model(**batch(TRAIN, 8 * step, 8)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if anchor is not None and uniform(SEED, step) < R:
            with torch.no_grad():
                for p, (value, state) in zip(model.parameters(), anchor, strict=True):
                    p.copy_(value)
                    for key in state:
                        optimizer.state[p][key].copy_(state[key])
            resets.append(step)
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            model.eval()
            with torch.no_grad():
                loss = model(**batch(VALIDATION, 0, len(VALIDATION))).loss.item()
            if loss < best:
                best, where = loss, step + 1
                anchor = [
                    (p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()})
                    for p in model.parameters()
                ]
        history[step + 1] = weights(model)
    return history, resets, where


def test_callback_and_trainer_equal_the_reference_twin_at_every_step(tmp_path):
    history, resets, where = reference_twin()
    assert 3 <= len(resets) < STEPS - EVERY  # neither trivial nor all
    settings = {"train_sampling_strategy": "sequential", "learning_rate": LR}
    reset = callback(probability=R, seed=SEED, finish="last")
    _, recorder = plain_run(tmp_path / "a", callback=reset, model=bert(dropout=0), **settings)
    trainer, by_trainer = reset_run(
        tmp_path / "b",
        model=bert(dropout=0),
        reset_probability=R,
        reset_patience=0,
        reset_seed=SEED,
        reset_finish="last",
        **settings,
    )
    for step in range(1, STEPS + 1):
        assert equal(history[step], recorder.after_step[step]), step
        assert equal(history[step], by_trainer.after_step[step]), step
    for events in (reset.events, trainer.reset_callback.events):
        assert steps_of(events, "reset") == resets
        assert steps_of(events, "anchor")[-1] == where


def test_probability_zero_is_the_plain_trainer_bit_for_bit(tmp_path):
    plain, recorder = plain_run(tmp_path / "plain")
    for name, run in {
        "callback": lambda path: plain_run(path, callback=callback(probability=0)),
        "trainer": lambda path: reset_run(path, reset_probability=0.0),
    }.items():
        _, other = run(tmp_path / name)
        assert all(equal(recorder.after_step[step], other.after_step[step]) for step in recorder.after_step)
        assert recorder.rates == other.rates
    reset = callback(probability=0, finish="last")
    trainer, _ = plain_run(tmp_path / "last", callback=reset)
    assert equal(weights(plain.model), weights(trainer.model))
    assert reset.store is None  # and costs no memory
    assert steps_of(reset.events, "anchor")  # but the audit trail is there
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (plain, trainer)]
    assert losses[0] == losses[1]


def test_probability_one_holds_the_run_at_the_anchor(tmp_path):
    reset = callback(probability=1.0, anchor="fixed")
    _, recorder = plain_run(tmp_path, callback=reset)
    assert steps_of(reset.events, "reset") == list(range(3, 15))
    assert all(equal(recorder.after_step[step], recorder.after_step[3]) for step in range(3, 16))
    assert not equal(recorder.after_step[2], recorder.after_step[3])


def test_a_reset_lands_exactly_on_the_best_evaluated_weights(tmp_path):
    reset = callback(probability=0.4)
    trainer, recorder = plain_run(tmp_path, callback=reset)
    resets = steps_of(reset.events, "reset")
    assert resets
    for event in reset.events:
        if event["kind"] == "reset":
            seen = {s: loss for s, (loss, _) in recorder.evaluated.items() if s <= event["step"]}
            best = min(seen, key=seen.get)
            assert event["anchor_step"] == best
            assert event["metric"] == seen[best]
            assert event["distance"] > 0
            assert equal(recorder.after_step[event["step"] + 1], recorder.evaluated[best][1])
    best = min(recorder.evaluated, key=lambda step: recorder.evaluated[step][0])
    assert equal(weights(trainer.model), recorder.evaluated[best][1])  # finish="anchor"


@pytest.mark.parametrize("scope", ["head", "last:1"])
def test_a_finish_under_a_partial_scope_is_weights_that_were_evaluated(scope, tmp_path):
    """And not the anchor's part beside the last step's rest, which nobody evaluated."""
    reset = callback(probability=0.4, scope=scope)
    trainer, recorder = plain_run(tmp_path, callback=reset, learning_rate=2e-2, **SAVING)
    best = reset.reset_state.anchor_step
    assert best < 15
    assert equal(weights(trainer.model), recorder.evaluated[best][1])
    assert trainer.evaluate()["eval_loss"] == recorder.evaluated[best][0]
    again = callback(probability=0.4, scope=scope)
    resumed, _ = plain_run(tmp_path, callback=again, train=False, learning_rate=2e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert equal(weights(resumed.model), weights(trainer.model))


def test_a_negative_control_different_seeds_differ(tmp_path):
    _, one = plain_run(tmp_path / "1", callback=callback(seed=1))
    _, two = plain_run(tmp_path / "2", callback=callback(seed=2))
    assert not equal(one.after_step[15], two.after_step[15])


def test_partial_scopes_touch_only_themselves(tmp_path):
    """Dropout off and optimizer state kept: until its first reset the run is the plain one, and then only the
    scope goes back."""
    _, plain = plain_run(tmp_path / "plain", model=bert(dropout=0))
    reset = callback(probability=0.5, scope="head", max_resets=1)
    _, recorder = plain_run(tmp_path / "head", model=bert(dropout=0), callback=reset)
    (step,) = steps_of(reset.events, "reset")
    (anchor,) = {e["anchor_step"] for e in reset.events if e["kind"] == "reset"}
    for name, value in recorder.after_step[step + 1].items():
        expected = plain.after_step[anchor if name.startswith("classifier") else step + 1][name]
        assert torch.equal(value, expected), name
    assert reset.store.names == ["classifier.weight", "classifier.bias"]


def test_the_learning_rate_schedule_goes_on_untouched(tmp_path):
    _, plain = plain_run(tmp_path / "plain", lr_scheduler_type="cosine")
    _, reset = plain_run(tmp_path / "reset", lr_scheduler_type="cosine", callback=callback())
    assert plain.rates == reset.rates


def test_device_and_cpu_anchors_are_equal(tmp_path):
    runs = [plain_run(tmp_path / s, callback=callback(storage=s))[1].after_step[15] for s in ("device", "cpu")]
    assert equal(*runs)


def test_the_trainer_equals_the_callback_where_nothing_is_random(tmp_path):
    """Skipping a discarded step changes nothing else: without dropout, not one bit."""
    _, one = plain_run(tmp_path / "1", model=bert(dropout=0), callback=callback(probability=0.3))
    _, two = reset_run(tmp_path / "2", model=bert(dropout=0), reset_probability=0.3, reset_patience=0)
    assert all(equal(one.after_step[step], two.after_step[step]) for step in range(1, 16))


def test_periodic_gaps_in_a_run(tmp_path):
    reset = callback(probability=0.25, policy="periodic")
    plain_run(tmp_path, callback=reset)
    assert steps_of(reset.events, "reset") == [6, 10, 14]


def test_config_default_is_the_contract():
    assert ResetConfig() == ResetConfig(
        probability=0.01,
        scope="all",
        policy="bernoulli",
        patience=None,
        metric=None,
        greater_is_better=None,
        min_delta=0.0,
        anchor="best",
        optimizer_state="restore",
        storage="device",
        finish="anchor",
        max_resets=None,
        seed=None,
    )
