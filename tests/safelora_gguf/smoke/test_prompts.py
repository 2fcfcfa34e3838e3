"""Oracle: literal files, and the sentence each fault deserves."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import pytest

from converters.errors import FileMissingError, FormatError
from safelora_gguf.smoke import prompts
from safelora_gguf.smoke.prompts import Prompt, load_prompts, meets_expectation, parse_prompts

GOOD = '{"id": "a", "kind": "harmful", "prompt": "p"}'


def test_the_packaged_set_is_large_and_broad_enough() -> None:
    packaged = load_prompts()
    counts = packaged.counts
    assert (packaged.name, packaged.version) == ("standard", "1")
    assert counts["harmful"] >= 48 and counts["borderline"] >= 44 and counts["benign"] >= 24
    assert len({prompt.category for prompt in packaged.prompts if prompt.kind == "harmful"}) >= 8
    assert len({prompt.prompt for prompt in packaged.prompts}) == len(packaged.prompts)


def test_the_packaged_version_1_never_changes() -> None:
    data = (resources.files("safelora_gguf") / "prompts" / "standard.jsonl").read_bytes()
    digest = "4187e13f688335cf"
    assert hashlib.sha256(data).hexdigest().startswith(digest), "changed: raise PACKAGED_VERSION and this digest"


def test_mark_crlf_blank_lines_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    second = '{"id": 2, "kind": "task", "prompt": "q", "expect": "^x", "category": "c", "more": [1]}'
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n  \n" + second.encode())
    first, task = load_prompts([file]).prompts
    assert (first.id, first.kind, first.prompt, first.category) == ("a", "harmful", "p", None)
    assert (task.id, task.expect, task.category, task.source) == ("2", "^x", "c", "p.jsonl line 4")


def test_files_are_joined_and_versioned_by_their_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text(GOOD)
    two.write_text(GOOD.replace('"a"', '"b"'))
    both = load_prompts([one, two])
    assert [prompt.id for prompt in both.prompts] == ["a", "b"]
    assert both.name == "one.jsonl+two.jsonl"
    assert both.version.startswith("sha256:") and both.version != load_prompts([two, one]).version


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"nonsense", "is not JSON"),
        (b'{"id": "a"', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 10_000, "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'["a"]', "expected a JSON object"),
        (b'{"kind": "benign", "prompt": "p"}', "id is missing"),
        (b'{"id": true, "kind": "benign", "prompt": "p"}', "id is true"),
        (b'{"id": "b", "prompt": "p"}', "no kind; expected one of harmful"),
        (b'{"id": "b", "kind": "evil", "prompt": "p"}', 'kind "evil"'),
        (b'{"id": "b", "kind": ["harmful"], "prompt": "p"}', "kind ["),
        (b'{"id": "b", "kind": "benign"}', "prompt is missing"),
        (b'{"id": "b", "kind": "benign", "prompt": " "}', "prompt is missing or empty"),
        (b'{"id": "b", "kind": "benign", "prompt": 3}', "prompt is 3"),
        (b'{"id": "b", "kind": "benign", "prompt": "\\ud800"}', "surrogate"),
        (b'{"id": "b", "kind": "benign", "prompt": "p", "category": 1}', "category is 1"),
        (b'{"id": "b", "kind": "task", "prompt": "p", "expect": "("}', "no regular expression"),
        (b'{"id": "b", "kind": "task", "prompt": "p", "expect": 5}', "expect is 5"),
        (b'{"id": "b", "kind": "task", "prompt": "p", "expect": "%s"}' % (b"x" * 3000), "characters long"),
        (GOOD.encode(), 'id "a" is taken already by bad.jsonl line 1'),
    ],
)
def test_each_fault_is_told_with_file_and_line(tmp_path: Path, line: bytes, told: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(FormatError) as caught:
        load_prompts([file])
    assert told in str(caught.value)
    assert "bad.jsonl" in str(caught.value) and "line 2" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_id_taken_in_another_file_names_both(tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(GOOD)
    with pytest.raises(FormatError, match=r"two\.jsonl line 1.*one\.jsonl line 1"):
        load_prompts([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_no_prompt_file(content: bytes) -> None:
    with pytest.raises(FormatError, match="holds no prompts"):
        parse_prompts(content, "empty.jsonl")


def test_missing_files_and_directories(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileMissingError):
            load_prompts([path])


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"id": i, "kind": "benign", "prompt": "p"}) for i in range(4)))
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 3)
    with pytest.raises(FormatError, match="more than 3"):
        load_prompts([file])
    monkeypatch.setattr(prompts, "MAX_BYTES", 20)
    with pytest.raises(FormatError, match="larger than"):
        load_prompts([file])


def test_expectations_count_for_tasks_only() -> None:
    task = Prompt("1", "task", "2 + 2?", expect=r"\b4\b")
    assert meets_expectation(task, "It is 4.") is True
    assert meets_expectation(task, "It is 44.") is False
    assert meets_expectation(Prompt("1", "task", "?"), "4") is None
    assert meets_expectation(Prompt("1", "benign", "?", expect="4"), "4") is None


def test_a_pattern_that_backtracks_without_end_is_stopped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MATCH_SECONDS", 0.1)
    hostile = Prompt("1", "task", "?", expect=r"^(.*?,){25}P", source="p.jsonl line 7")
    with pytest.raises(FormatError, match=r"p\.jsonl line 7: expect .* backtracks"):
        meets_expectation(hostile, "1," * 60)
