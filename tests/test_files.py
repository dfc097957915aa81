"""Writing aside, then renaming: whole files or none."""

import os
import stat

import pytest

from anyup_fast.files import written_aside


def test_the_file_appears_whole_with_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with written_aside(path) as aside:
        assert aside.parent == path.parent and aside.suffix == ".txt"
        aside.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(error), written_aside(str(path)) as aside:
        aside.write_text("half")
        raise error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(RuntimeError), written_aside(tmp_path / "file.txt") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_saver_that_replaces_the_temporary_file_is_fine(tmp_path):
    path = tmp_path / "file.txt"
    with written_aside(path) as aside:
        aside.unlink()
        aside.write_text("whole")
    assert path.read_text() == "whole"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    with written_aside(tmp_path / "aside") as aside:
        aside.write_text("")
    plain, written = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "aside"))
    assert written == plain


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), written_aside(tmp_path / "folder") as aside:
        aside.write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), written_aside(tmp_path / "file" / "below.txt"):
        pytest.fail("there is nothing to write to")
