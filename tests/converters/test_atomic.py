"""Oracle: the directory listing. A target is old or new, whole, and nothing else is left."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from converters import atomic
from converters.atomic import atomic_directory, atomic_file, refuse_to_overwrite
from converters.errors import OutputPathError, WriteError
from converters.fingerprint import sha256_file


def _listing(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "new" / "out", force=False) as file:
        file.write(b"data")
        assert not (tmp_path / "new" / "out").exists()
    assert (tmp_path / "new" / "out").read_bytes() == b"data"
    assert _listing(tmp_path / "new") == ["out"]


def test_an_input_is_no_target_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "read").write_bytes(b"data")
    (tmp_path / "link").symlink_to("read")
    for target in ("read", "link", "../" + tmp_path.name + "/read"):
        with pytest.raises(OutputPathError, match="is one of the inputs"):
            refuse_to_overwrite(tmp_path / target, [tmp_path / "other", tmp_path / "read"])
    refuse_to_overwrite(tmp_path / "new", [tmp_path / "read"])


def test_after_an_error_the_target_is_untouched_and_nothing_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(target, force=True) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert target.read_bytes() == b"old"
    assert _listing(tmp_path) == ["out"]


def test_parents_made_for_a_failed_output_go_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a" / "b" / "out", force=False):
        raise ZeroDivisionError
    assert _listing(tmp_path) == []


def test_existing_targets_need_force(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OutputPathError), atomic_file(tmp_path / "file", force=False):
        pass
    with pytest.raises(OutputPathError), atomic_directory(tmp_path / "directory", force=False):
        pass
    with pytest.raises(OutputPathError), atomic_file(tmp_path / "directory", force=True):
        pass
    with pytest.raises(OutputPathError), atomic_directory(tmp_path / "file", force=True):
        pass
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputPathError), atomic_file(target, force=False) as file:
        file.write(b"ours")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    assert _listing(tmp_path) == ["out"]


def test_a_directory_is_swapped_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_directory(target, force=True) as directory:
        (directory / "fresh").write_text("new")
        assert _listing(target) == ["stale"]
    assert _listing(target) == ["fresh"]
    assert _listing(tmp_path) == ["out"]


def test_a_link_keeps_pointing_and_its_target_changes(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link", force=True) as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_full_disk_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="no space"), atomic_file(tmp_path / "out", force=False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert _listing(tmp_path) == []


_SLEEPER = """
import sys, time
from pathlib import Path
from converters.atomic import atomic_file
with atomic_file(Path(sys.argv[1]), force=True) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def _writer(target: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", _SLEEPER, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def test_after_sigkill_the_target_is_untouched_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    process = _writer(target)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert target.read_bytes() == b"old"
    left = [name for name in _listing(tmp_path) if name != "out"]
    assert all("safelora-gguf" in name for name in left)
    with atomic_file(target, force=True) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert _listing(tmp_path) == ["out"]


def test_a_temporary_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    process = _writer(tmp_path / "out")
    try:
        with pytest.raises(OutputPathError, match="another process"), atomic_file(tmp_path / "out", force=True):
            pass
        time.sleep(0.05)
        assert any("safelora-gguf" in name for name in _listing(tmp_path))
    finally:
        process.kill()
        process.wait()


def test_a_signal_during_the_swap_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is replaced must not be left over under the temporary name."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    publish = atomic._publish_directory

    def interrupted(temporary: Path, place: Path) -> None:
        publish(temporary, place)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(atomic, "_publish_directory", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(target, force=True) as directory:
        (directory / "new").write_bytes(b"new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_hash_of_a_large_file_is_known_once_it_is_written(tmp_path: Path) -> None:
    """Oracle: hashlib over the file; also where it is changed afterwards."""
    target, data = tmp_path / "large", bytes(17 << 20)
    with atomic_file(target, force=False) as file:
        file.write(data)
    assert sha256_file(target) == hashlib.sha256(data).hexdigest()
    target.write_bytes(b"x" + data[1:])
    assert sha256_file(target) == hashlib.sha256(b"x" + data[1:]).hexdigest()
