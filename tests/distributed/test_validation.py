"""Validation figures in two processes are those of one: the rows that pad the last batch do not count."""

import pytest
from launch import HERE, launch, results
from validation import calibrated

pytestmark = pytest.mark.distributed


def test_calibrated_loss_leaves_padding_out(tmp_path):
    alone = calibrated(tmp_path / "alone")
    for rank in results(launch(HERE / "validation.py", str(tmp_path)), tmp_path):
        for way in ("whole", "batches"):
            for name in ("eval_calibrated_loss", "eval_label_noise", "eval_temperature"):
                assert rank["calibrated"][way][name] == pytest.approx(alone[way][name], rel=1e-4), (way, name)
