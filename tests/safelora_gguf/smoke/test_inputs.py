"""Oracle: contract.md's rule for PATH=SCALE, and the ranges the options have."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.errors import FileMissingError, FormatError, MissingLlamaError, UsageError
from safelora_gguf.smoke import smoke_test, split_scale
from safelora_gguf.smoke.inputs import SMALL_MODEL, default_threads


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.gguf", ("a.gguf", 1.0)),
        ("a.gguf=0.5", ("a.gguf", 0.5)),
        ("a.gguf=-1", ("a.gguf", -1.0)),
        ("a.gguf=1e-2", ("a.gguf", 0.01)),
        ("a.gguf=.5", ("a.gguf", 0.5)),
        ("a=b.gguf", ("a=b.gguf", 1.0)),
        ("a=1=2", ("a=1", 2.0)),
        ("r=16/a.gguf", ("r=16/a.gguf", 1.0)),
        ("a.gguf=", ("a.gguf=", 1.0)),
        ("a.gguf=nan", ("a.gguf=nan", 1.0)),
        ("a.gguf=1_0", ("a.gguf=1_0", 1.0)),
        ("=2", ("=2", 1.0)),
    ],
)
def test_split_at_the_last_equals_sign_before_a_number(text: str, expected: tuple[str, float]) -> None:
    assert split_scale(text) == expected


def test_an_existing_path_is_not_split(tmp_path: Path) -> None:
    path = tmp_path / "run=3"
    path.touch()
    assert split_scale(str(path)) == (str(path), 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"min_refusal": 1.1},
        {"min_refusal": float("nan")},
        {"max_over_refusal": -0.1},
        {"max_tokens": 0},
        {"threads": 0},
        {"gpu_layers": -2},
        {"ctx": 8},
        {"prompt_timeout": 0.0},
        {"load_timeout": float("inf")},
        {"labels": ["one", "two"]},
    ],
)
def test_numbers_that_make_no_sense(tmp_path: Path, options: dict[str, object]) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    with pytest.raises(UsageError):
        smoke_test(model, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_is_finite(tmp_path: Path, scale: float) -> None:
    with pytest.raises(UsageError, match="finite"):
        smoke_test(tmp_path / "m.gguf", [(tmp_path / "a.gguf", scale)])


def test_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    good, text = tmp_path / "m.gguf", tmp_path / "m.txt"
    good.write_bytes(b"GGUF")
    text.write_text("hello")
    with pytest.raises(FileMissingError):
        smoke_test(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="b'hell'"):
        smoke_test(text)
    with pytest.raises(FormatError, match="directory"):
        smoke_test(good, [tmp_path])
    with pytest.raises(FileMissingError):
        smoke_test(good, compare=[(tmp_path / "none.gguf", None)])


def test_without_llama_cpp_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingLlamaError, match="safelora-gguf"):
        smoke_test(model)


def test_small_models_get_one_thread_and_large_ones_at_most_eight(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.touch()
    assert default_threads(model) == 1
    with model.open("wb") as stream:
        stream.truncate(SMALL_MODEL)  # sparse
    assert 1 <= default_threads(model) <= 8
