"""Options from YAML and command line, refused by name, and the end of a command."""

import errno
import math
from dataclasses import dataclass, field

import pytest

from hf_reset.errors import ConfigError
from hf_reset.study.options import (
    RecipeArguments,
    option,
    parse_recipe,
    refuse_ignored,
    refuse_too_small,
    run_command,
)


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


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ({"seed": 3, "seeds": [0]}, {"seed"}, "`seed` 3 would be ignored: .* Give --seeds"),
        ({"noise_kind": "pair", "noise_rate": 0.0}, {"noise_kind"}, "`noise_kind` 'pair' without `noise_rate`"),
        (
            {"noise_kind": "pair", "noise_matrix": "[]"},
            set(),
            "`noise_matrix` would be ignored with `noise_kind` 'pair'",
        ),
        ({"noise_kind": "matrix", "noise_rate": 0.2}, {"noise_rate"}, r"`noise_rate` 0\.2 would be ignored"),
        ({"loss": "gce", "reset_loss": "sce"}, set(), "`loss` 'gce' and `reset_loss` 'sce' are the same"),
        ({"loss": None, "loss_options": "{}"}, set(), "`loss_options` needs a `loss`"),
        ({"resume_from_checkpoint": "no/where"}, set(), "`resume_from_checkpoint` is 'no/where'.*checkpoint last"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(values, given, message):
    with pytest.raises(ConfigError, match=message):
        refuse_ignored(values, given)


def test_what_has_an_effect_is_not_refused():
    refuse_ignored({"noise_kind": "pair", "noise_rate": 0.0}, {"noise_kind", "noise_rate"})  # none, and said so
    refuse_ignored({"noise_kind": "symmetric", "noise_rate": 0.4, "seed": 42, "seeds": [0]}, {"noise_rate"})
    refuse_ignored({"noise_kind": "matrix", "noise_matrix": "[]", "noise_rate": 0.0}, {"noise_kind", "noise_matrix"})
    refuse_ignored({"resume_from_checkpoint": "last", "loss": "gce", "reset_loss": None}, {"loss"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_train_samples", 0), ("max_eval_samples", -1), ("noise_rate", -0.1), ("noise_rate", math.nan)],
)
def test_sizes_and_rates_that_cannot_be_are_refused(name, value):
    @dataclass
    class Recipe(RecipeArguments):
        noise_rate: float = option(0.0, "Share.", at_least=0)

    refuse_too_small(Recipe())
    with pytest.raises(ConfigError, match=rf"`{name}` must be at least \d, got {value}"):
        refuse_too_small(Recipe(**{name: value}))


def failing_with(error):
    def run(argv):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            "error: No space left on device: runs/a. Make room",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), "error: Permission denied: runs/a."),
        (RuntimeError("[enforce fail] PytorchStreamWriter: file write failed\nat line 3"), "error: [enforce fail] Pyt"),
    ],
)
def test_a_disk_that_takes_no_files_ends_in_a_line(error, said):
    with pytest.raises(SystemExit) as stopped:
        run_command(failing_with(error), RecipeArguments, description="", argv=[])
    assert str(stopped.value).startswith(said)
    assert "\n" not in str(stopped.value)


def test_ctrl_c_ends_in_a_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(failing_with(KeyboardInterrupt()), RecipeArguments, description="", argv=[])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted; the same command with --resume_from_checkpoint last")


def test_an_error_of_our_own_making_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        run_command(failing_with(FileNotFoundError(errno.ENOENT, "gone")), RecipeArguments, description="", argv=[])


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
