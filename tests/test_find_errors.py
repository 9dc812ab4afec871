"""`hf-reset find-errors DATA`: planted wrong labels come out, every row is judged, and bad files are refused."""

import json
import math
import random

import numpy as np
import pandas as pd
import pytest

from hf_reset.cli import main
from hf_reset.errors import ConfigError, DataError
from hf_reset.rows.confident import estimate_noise
from hf_reset.study.find_errors import Search, find_errors, hold_out

TOPICS = {"fruit": "apple pear plum grape cherry", "metal": "iron copper zinc silver tin", "bird": "owl crow wren gull"}
SEARCH = {"steps": 30, "learning_rate": 3e-3, "max_length": 16, "vocab_size": 300}


def planted(n=120):
    """Rows of three topics told apart by any word, every sixth under the next topic's label."""
    draw, names = random.Random(0), list(TOPICS)
    rows, wrong = [], []
    for index in range(n):
        words = " ".join(draw.choices(TOPICS[names[index % 3]].split(), k=6))
        wrong.append(draw.random() < 1 / 6)
        rows.append({"text": words, "label": names[(index + wrong[-1]) % 3]})
    return pd.DataFrame(rows), np.array(wrong)


def auroc(quality, wrong):
    """Probability that a wrong label has the lower quality, and its standard error by Hanley and McNeil (1982)."""
    ranks = pd.Series(-quality).rank().to_numpy()
    n, m = int(wrong.sum()), int((~wrong).sum())
    area = (ranks[wrong].sum() - n * (n + 1) / 2) / (n * m)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (n - 1) * (q1 - area**2) + (m - 1) * (q2 - area**2)) / (n * m)
    return area, math.sqrt(max(variance, 0.0))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The command from end to end: a csv with gaps in, table and report out."""
    folder = tmp_path_factory.mktemp("errors")
    frame, wrong = planted()
    frame.loc[120] = ["  ", "fruit"]
    frame.loc[121] = ["apple <b>pear</b> | plum", None]
    frame.to_csv(folder / "data.csv", index=False)
    options = [word for name, value in SEARCH.items() for word in (f"--{name}", str(value))]
    assert main(["find-errors", str(folder / "data.csv"), *options]) == 0
    return folder, wrong


def test_planted_errors_have_the_low_quality(found):
    folder, wrong = found
    table = pd.read_csv(folder / "data-suspects.csv").iloc[:120]
    area, error = auroc(table["label_quality"].to_numpy(), wrong)
    assert area - 3 * error > 0.5, (area, error)
    flagged = table["is_label_issue"].to_numpy()
    assert wrong[flagged].mean() > 2 * wrong.mean()


def test_held_out_rows_are_judged_too(found):
    folder, wrong = found
    table = pd.read_csv(folder / "data-suspects.csv").iloc[:120]
    held = ~table["in_training"].to_numpy()
    assert 15 <= held.sum() <= 21
    assert (table.loc[held, "visits"] == 30).all()  # an evaluation a step
    assert (table.loc[~held, "visits"] >= 4).all()  # 30 steps of 16 rows
    assert table["label_quality"].notna().all()
    area, error = auroc(table.loc[held, "label_quality"].to_numpy(), wrong[held])
    assert area - 2 * error > 0.5, (area, error)


def test_the_table_is_in_the_files_order_with_texts_and_class_names(found):
    folder, _ = found
    table, frame = pd.read_csv(folder / "data-suspects.csv"), pd.read_csv(folder / "data.csv")
    assert table["row"].tolist() == list(range(122))
    assert table["text"][:120].tolist() == frame["text"][:120].tolist()
    assert table["given_class"][:120].tolist() == frame["label"][:120].tolist()
    names = sorted(TOPICS)
    assert [names[label] for label in table["predicted_label"][:120]] == table["predicted_class"][:120].tolist()
    left_out = table.iloc[120:]
    assert left_out["label_quality"].isna().all()
    assert not left_out[["is_label_issue", "in_training"]].any(axis=None)


def test_the_report_shows_the_worst_rows_and_says_what_it_cannot_see(found):
    folder, _ = found
    text = (folder / "data-suspects.html").read_text()
    table = pd.read_csv(folder / "data-suspects.csv")
    worst = table[table["is_label_issue"]].sort_values("rank").iloc[0]
    assert worst["text"] in text
    assert f"at {worst['wrong_events']} of {worst['visits']} visits" in text
    assert f"margin {worst['margin']:+.2f}" in text
    assert "Do not drop rows of a test set" in text
    assert "mistakes that a model can learn" in text
    assert "1 rows have no text in &#x27;text&#x27; and were left out: 120." in text
    assert "1 rows have no label in &#x27;label&#x27; and were left out: 121." in text
    assert 'src="data:image/png;base64,iVBOR' in text


def test_parquet_in_and_out_a_budget_and_a_markdown_report(tmp_path, capsys):
    frame, _ = planted(60)
    frame.assign(label=frame["label"].map(list(TOPICS).index)).rename(
        columns={"text": "body", "label": "y"}
    ).to_parquet(tmp_path / "in.parquet")
    out = tmp_path / "new" / "out.parquet"
    options = ["--text_column", "body", "--label_column", "y", "--output", str(out), "--budget", "2", "--steps", "12"]
    options += ["--max_length", "16", "--vocab_size", "300", "--report", str(tmp_path / "r.md"), "--seed", "1"]
    assert main(["find-errors", str(tmp_path / "in.parquet"), *options]) == 0
    table = pd.read_parquet(out)
    assert table["is_label_issue"].sum() <= 2
    assert set(table["given_class"]) == {"0", "1", "2"}
    assert "![Confusion of labels](r.png)" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert str(out) in capsys.readouterr().out


def test_markup_in_a_text_is_shown_and_not_acted_on(tmp_path):
    from hf_reset.report.suspects import write_suspects_report

    table = pd.DataFrame(
        {
            "text": ["<script>a | b</script>", "fine"],
            "is_label_issue": [True, False],
            "label_quality": [0.1, 0.9],
            "given_class": ["x", "y"],
            "predicted_class": ["y", "y"],
            "margin": [-0.8, 0.8],
            "given_probability": [0.1, 0.9],
            "visits": [4, 4],
            "wrong_events": [4, 0],
            "rank": [1, 2],
        }
    )
    noise = estimate_noise(np.array([[0.1, 0.9], [0.1, 0.9]]), [0, 1])
    for name in ("r.html", "r.md"):
        text = write_suspects_report(tmp_path / name, table, noise, ["x", "y"], title="t", run={}).read_text()
        assert "<script>" not in text
        assert "&lt;script&gt;" in text
    with pytest.raises(ConfigError, match=r"must end in \.html or \.md"):
        write_suspects_report(tmp_path / "r.pdf", table, noise, ["x", "y"], title="t", run={})


def written(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


ROWS = [{"text": f"word {index}", "label": "ab"[index % 2]} for index in range(40)]


@pytest.mark.parametrize(
    ("rows", "search", "message"),
    [
        (ROWS, {"text_column": "body"}, "`text_column` is 'body', which the file does not have. Name one of 'text'"),
        (ROWS, {"label_column": "y"}, "`label_column` is 'y'"),
        ([{**row, "label": "a"} for row in ROWS], {}, "has the one class 'a'"),
        ([{**row, "label": f"c{n}"} for n, row in enumerate(ROWS)], {}, "has 40 classes in 40 rows"),
        ([{**row, "label": 0.5 * n} for n, row in enumerate(ROWS)], {}, "must hold integers or strings, got 0.0"),
        ([{**row, "text": n} for n, row in enumerate(ROWS)], {}, "must hold strings, got 0 .int. in row 0"),
        ([{**row, "text": " "} for row in ROWS], {}, "no row has both a text and a label"),
        (ROWS[:4], {}, "0 rows could be held out of 4 in 2 classes"),
    ],
)
def test_files_that_cannot_be_judged(tmp_path, rows, search, message):
    with pytest.raises(DataError, match=message):
        find_errors(written(tmp_path, rows), Search(**search))


def test_a_file_that_is_not_there_ends_in_one_line(tmp_path, capsys):
    assert main(["find-errors", str(tmp_path / "none.csv")]) == 2
    assert "none.csv' is not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "x.xlsx"], "`output` 'x.xlsx' must end in .csv or .parquet"),
        (["--report", "x.pdf"], "`report` 'x.pdf' must end in .html or .md"),
        (["--noise_rate", "1.5"], "`noise_rate` must be in"),
        (["--steps", "0"], "`steps` must be at least 1, got 0"),
        (["--model", "no-such-folder/model"], "`model` 'no-such-folder/model' cannot be loaded"),
    ],
)
def test_options_that_cannot_be(tmp_path, capsys, options, message):
    assert main(["find-errors", str(written(tmp_path, ROWS)), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_data_is_never_written_over(tmp_path, capsys):
    planted(40)[0].to_csv(tmp_path / "data.csv", index=False)
    path = str(tmp_path / "data.csv")
    assert main(["find-errors", path, "--output", path]) == 2
    assert "is the data itself" in capsys.readouterr().err


def test_each_class_keeps_rows_to_learn_from():
    labels = np.array([0] * 40 + [1] * 20 + [2] * 2 + [-100] * 5)
    held = hold_out(labels, seed=0)
    assert [int(held[labels == one].sum()) for one in (0, 1, 2, -100)] == [6, 3, 0, 0]
    assert not np.array_equal(held, hold_out(labels, seed=1))


def test_a_model_of_ones_own_gets_a_head_for_the_files_classes(tmp_path):
    from tiny import bert

    from hf_reset.corpora.tokenizers import train_tokenizer

    frame, _ = planted(60)
    tokenizer = train_tokenizer(frame["text"], 300)
    bert(vocab_size=len(tokenizer), num_labels=5, max_position_embeddings=32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    frame.to_csv(tmp_path / "data.csv", index=False)
    model = str(tmp_path / "model")
    found = find_errors(tmp_path / "data.csv", Search(model=model, steps=8, max_length=16))
    assert found.table["label_quality"].notna().all()
    assert found.noise.joint.shape == (3, 3)
    with pytest.raises(ConfigError, match="`max_length` is 64, and the model has 32 positions"):
        find_errors(tmp_path / "data.csv", Search(model=model, max_length=64))
