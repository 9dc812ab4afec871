"""What only a GPU can show. Skipped in words where there is none; nothing here has run on a CPU."""

import pytest
import torch
from tiny import bert, equal, reset_run, steps_of, weights

from hf_reset import AnchorStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here"),
]

RESETS = {"reset_probability": 0.5, "reset_patience": 0, "use_cpu": False}


def test_pinned_anchor_on_the_cpu_equals_one_on_the_device(tmp_path):
    on_device, _ = reset_run(tmp_path / "device", **RESETS)
    on_cpu, _ = reset_run(tmp_path / "cpu", reset_storage="cpu", **RESETS)
    assert all(value.is_pinned() for value in on_cpu.reset_callback.store.tensors().values())
    assert on_device.reset_callback.events == on_cpu.reset_callback.events
    assert equal(weights(on_device.model), weights(on_cpu.model))


def test_snapshot_to_pinned_memory_has_landed_before_the_next_step():
    """The copy is asynchronous: without a wait, a kernel queued right after it would change what it reads."""
    model = torch.nn.Linear(4096, 4096, device="cuda")
    anchor = AnchorStore(model, storage="cpu")
    with torch.no_grad():
        model.weight.fill_(1.0)
        anchor.snapshot()
        model.weight.fill_(2.0)
    assert anchor.tensors()["weight"].eq(1.0).all()
    anchor.restore()
    assert model.weight.eq(1.0).all()


def test_resets_under_the_fp16_scaler(tmp_path):
    """Forward and backward are not skipped, as the scaler needs gradients; an overflow does not break a reset."""
    trainer, recorder = reset_run(tmp_path, fp16=True, **RESETS)
    assert trainer.accelerator.scaler is not None
    events = trainer.reset_callback.events
    assert len(steps_of(events, "reset")) >= 3
    for event in events:
        if event["kind"] == "reset":
            assert equal(recorder.after_step[event["step"] + 1], recorder.evaluated[event["anchor_step"]][1])


def test_resume_is_exact_under_bf16(tmp_path):
    settings = RESETS | {"bf16": True, "save_strategy": "steps", "save_steps": 6}
    straight, _ = reset_run(tmp_path, **settings)
    again, _ = reset_run(tmp_path, resume=str(tmp_path / "checkpoint-6"), **settings)
    assert equal(weights(straight.model), weights(again.model))


def test_resets_in_place_keep_compiled_cuda_graphs(tmp_path):
    """`mode="reduce-overhead"` captures addresses: a reset in another place would not be seen by the replay."""
    eager, _ = reset_run(tmp_path / "eager", model=bert(dropout=0.0), **RESETS)
    more = RESETS | {"torch_compile": True, "torch_compile_mode": "reduce-overhead"}
    compiled, recorder = reset_run(tmp_path / "compiled", model=bert(dropout=0.0), **more)
    events = compiled.reset_callback.events
    assert steps_of(events, "reset") == steps_of(eager.reset_callback.events, "reset")
    for event in events:
        if event["kind"] == "reset":
            assert equal(recorder.after_step[event["step"] + 1], recorder.evaluated[event["anchor_step"]][1])
    for name, value in weights(compiled.model).items():
        torch.testing.assert_close(value, weights(eager.model)[name], rtol=1e-2, atol=1e-2)
