"""Where scratch is, and that nothing is left of it.

Oracle: the system's own listing of directories.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from safelora_gguf.scratch import roomy_scratch, scratch_beside


def test_without_tmpdir_everything_is_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    with scratch_beside(tmp_path / "out.gguf", "repair") as scratch, roomy_scratch(scratch) as roomy:
        assert roomy == scratch and scratch.parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_where_tmpdir_is_set_it_takes_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = temporary_directory(tmp_path, monkeypatch)
    with scratch_beside(tmp_path / "out.gguf", "repair") as scratch:
        with roomy_scratch(scratch) as roomy, roomy_scratch(scratch) as other:
            (roomy / "inputs").write_bytes(b"many")
            assert roomy.parent == other.parent == temporary and roomy != other
        assert scratch.is_dir()
        assert not list(temporary.iterdir())


def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", None)  # which is remembered
    return place
