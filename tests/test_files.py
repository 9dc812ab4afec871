"""Files and folders are there whole or not at all."""

import os

import pytest

from hf_reset.files import write_atomic, written_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def stopped(*_):
    raise KeyboardInterrupt


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_file_is_written_into_a_new_folder_and_replaces_an_old_one(tmp_path):
    for text in ("one", "zwei ü"):
        assert write_atomic(tmp_path / "new" / "file", text).read_text(encoding="utf-8") == text
    assert names(tmp_path / "new") == ["file"]


def test_a_folder_is_there_with_all_its_files_or_not_at_all(tmp_path):
    def write(folder, *, broken):
        with written_whole(folder) as temporary:
            temporary.mkdir()
            (temporary / "first").write_text("1")
            assert not folder.exists()
            if broken:
                raise OSError("disk full")
            (temporary / "second").write_text("2")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "model", broken=True)
    assert names(tmp_path) == []
    write(tmp_path / "model", broken=False)
    assert names(tmp_path / "model") == ["first", "second"]


def test_litter_of_a_killed_process_is_no_hindrance(tmp_path):
    with written_whole(tmp_path / "file") as temporary:
        temporary.write_text("left")
        kept = temporary
    kept.mkdir()
    (kept / "left").write_text("left")
    write_atomic(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]
