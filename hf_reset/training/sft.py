"""Resetting in TRL's supervised fine-tuning: needs the extra `trl`."""

from __future__ import annotations

from dataclasses import dataclass

from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hf_reset.training.arguments import ResetArguments
from hf_reset.training.trainer import ResetTrainerMixin


@dataclass
class ResetSFTConfig(ResetArguments, SFTConfig):
    """`SFTConfig` with the `reset_*` fields."""


class ResetSFTTrainer(ResetTrainerMixin, SFTTrainer):
    """`SFTTrainer` with stochastic resetting; takes what `SFTTrainer` takes. See `ResetTrainerMixin`."""
