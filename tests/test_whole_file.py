"""Files that are written whole or not at all."""

from pathlib import Path

import pytest

from cloister.whole_file import whole_file


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with whole_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("replace", [False, True])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"old")

    def fail() -> None:
        with whole_file(path, replace=replace) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["key"]


def test_what_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError), whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    with whole_file(path, replace=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [one.name for one in tmp_path.iterdir()] == ["key"]
