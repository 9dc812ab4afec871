"""Options from YAML and command line, refused by name, and the end of a command."""

from dataclasses import dataclass, field

import pytest

from hf_reset.errors import ConfigError
from hf_reset.study.options import RecipeArguments, parse_recipe, run_command


@dataclass
class Options:
    noise_rate: float = 0.0
    seeds: list[int] = field(default_factory=lambda: [0])
    compare: bool = False
    train_file: str | None = None


@dataclass
class Training:
    learning_rate: float = 1e-3
    reset_probability: float = 0.01
    max_steps: int = -1
    hub_token: str | None = None


def parsed(tmp_path, yaml="", argv=()):
    (tmp_path / "c.yaml").write_text(yaml or "{}")
    return parse_recipe([Options, Training], ["--config", str(tmp_path / "c.yaml"), *argv])


def test_the_command_line_overrides_the_file(tmp_path):
    yaml = "noise_rate: 0.4\nseeds: [0, 1]\ncompare: true\nlearning_rate: 5e-4\nmax_steps: -1\ntrain_file: null\n"
    options, training, _ = parsed(tmp_path, yaml, ["--seeds", "2", "3", "4", "--compare", "false"])
    assert options == Options(noise_rate=0.4, seeds=[2, 3, 4], compare=False)
    assert training == Training(learning_rate=5e-4)


def test_the_configuration_has_what_was_asked_for_and_no_token(tmp_path):
    *_, configuration = parsed(tmp_path, "learning_rate: 0.1\nhub_token: secret\n", ["--max-steps", "3"])
    assert configuration == {
        "noise_rate": 0.0,
        "seeds": [0],
        "compare": False,
        "train_file": None,
        "learning_rate": 0.1,
        "reset_probability": 0.01,
        "max_steps": 3,
    }


@pytest.mark.parametrize(
    ("yaml", "argv", "message"),
    [
        ("nois_rate: 1\n", [], r"unknown key 'nois_rate' \(the nearest known is 'noise_rate'\)"),
        ("", ["--nois_rate", "1"], r"'--nois_rate' is not known \(the nearest known is 'noise_rate'\)"),
        ("", ["--noise", "1"], "'--noise' is not known"),
        ("noise_rate: much\n", [], "noise_rate.*invalid float value: 'much'"),
        ("- 1\n", [], "must hold `option: value` lines, got list"),
        ("a: [\n", [], "cannot be read"),
    ],
)
def test_what_is_not_an_option_is_refused_by_name(tmp_path, yaml, argv, message):
    with pytest.raises(ConfigError, match=message):
        parsed(tmp_path, yaml, argv)


def test_a_missing_configuration_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"`config` .*none\.yaml' cannot be read"):
        parse_recipe([Options, Training], ["--config", str(tmp_path / "none.yaml")])


def test_a_command_that_has_done_its_work_ends_the_process_group():
    """Else a thread of gloo may touch the interpreter while it shuts down, and torch aborts the process."""
    import torch.distributed as dist

    def run(argv):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if argv:
            raise ConfigError("`argv` is not empty.")

    run_command(run, RecipeArguments, description="", argv=[])
    assert not dist.is_initialized()
    with pytest.raises(SystemExit, match="error: `argv` is not empty"):
        run_command(run, RecipeArguments, description="", argv=["--seeds"])
    dist.destroy_process_group()  # an error of one rank alone must not wait for the others
