"""The README says what is so."""

import re
import shlex
from pathlib import Path

import pytest
from readme_tables import RESULTS, ROOT, render

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(section):
    text = re.search(rf"^## {section}\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE).group(1)
    return re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_quickstart_has_exactly_two_commands():
    main, tests = blocks("Quickstart")
    assert "--config recipes/text_classification/configs/quickstart.yaml --compare" in main
    assert "python -m pytest" in tests
    assert all("-c tests/constraints.txt" in block for block in (main, tests))


def test_ci_runs_the_second():
    assert "n == 2" in (ROOT / ".ci" / "run").read_text()


def test_the_tables_are_those_of_the_result_files():
    """`python tests/readme_tables.py` draws them anew."""
    assert render(README) == README
    assert README.count("<!-- table:") == README.count("<!-- end -->") >= 4


def test_every_figure_and_file_it_names_exists():
    targets = re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"`((?:recipes|tests)/[\w./]*)`", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("command", re.findall(r"^accelerate launch .*$", README, re.MULTILINE))
def test_every_launch_line_names_files_that_exist(command):
    words = shlex.split(command)
    files = [word for word in words if word.endswith((".py", ".yaml"))]
    assert files
    for file in files:
        assert (ROOT / file).is_file(), file


def test_every_result_file_says_where_it_came_from():
    for file in sorted(RESULTS.rglob("*.json")):
        text = file.read_text(encoding="utf-8")
        if "studies" not in file.parts:  # a study's configuration is its plan or its script
            assert '"configuration"' in text, file.name
        assert '"environment"' in text, file.name
        assert not re.search(r"/(tmp|work|root|home)/", text), file.name
    assert Path(RESULTS).is_dir()
