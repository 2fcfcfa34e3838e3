"""Oracles: PyYAML reads the header, markdown-it (CommonMark) the body, bash the command line."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator

import pytest
import yaml
from hostile_texts import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from converters.model_card import CardInput, ModelCard, Section, command_line, escaped


def header_and_body(markdown: str) -> tuple[dict[str, object], str]:
    """As hubs split it: at the first line that is `---`."""
    lines = markdown.split("\n")
    assert lines[0] == "---"
    end = lines.index("---", 1)
    return yaml.safe_load("\n".join(lines[1:end])), "\n".join(lines[end + 1 :])


def card(text: str) -> ModelCard:
    return ModelCard(
        title=text,
        description=text,
        license=text,
        license_name=text,
        tags=(text, "lora"),
        datasets=[text],
        languages=["no", text],
        library="transformers",
        facts={text: text, "several": [text, "b"], "rank": 6},
        sections=[Section(text, [text], [text, "plain"], [text, "b"], [(text, "1"), ("2", text)])],
        inputs=[CardInput(text, text, text, text)],
        invocation=text,
        notes=[text, "plain"],
        usage=[text],
    )


def tokens(markdown: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)


def shape(markdown: str) -> Iterator[str]:
    """The kinds of everything in a document, but for what is shown and how a fence is spelled."""
    for token in tokens(markdown):
        yield token.type
        yield from (child.type for child in token.children or () if child.type not in {"text", "text_special"})


def shown(markdown: str) -> list[str]:
    """What a reader sees outside of code: every heading, paragraph and cell."""
    return ["".join(child.content for child in token.children) for token in tokens(markdown) if token.children]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_header_gives_every_value_back(text: str) -> None:
    header, _ = header_and_body(card(text).to_markdown())
    unique = list(dict.fromkeys(["no", text]))
    assert header == {
        "library_name": "transformers",
        "license": text,
        "license_name": text,
        "tags": [text, "lora"],
        "datasets": [text],
        "language": unique,
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_text_adds_nothing_to_the_body(text: str) -> None:
    _, body = header_and_body(card(text).to_markdown())
    _, plain = header_and_body(card("plain").to_markdown())
    assert list(shape(body)) == list(shape(plain))
    if text.isprintable():
        seen = " ".join(text.split())
        assert shown(body)[:2] == [seen, seen]
        assert {seen, f"{seen}: {seen}", f"several: {seen}, b", "rank: 6"} <= set(shown(body))


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.strip))
@settings(max_examples=300, deadline=None)
def test_any_text_is_shown_and_nothing_else(text: str) -> None:
    assert list(shape(f"{escaped(text)}\n")) == ["paragraph_open", "inline", "paragraph_close"]
    header, _ = header_and_body(ModelCard(text, "", license=text).to_markdown())
    assert header == {"license": text}
    if " ".join(text.split()).isprintable():
        assert shown(escaped(text)) == [" ".join(text.split())]


def test_numbers_and_names_look_as_they_are() -> None:
    for text in ("1.25", "-0.5", "safelora-gguf 0.1.0: done", "Llama-2-7b (chat)"):
        assert escaped(text) == text


def test_repositories_alone_are_base_models() -> None:
    given_names = ["org/base", "/home/somebody/base", "https://huggingface.co/org/base", "~/x"]
    header, _ = header_and_body(ModelCard("t", "d", base_models=given_names).to_markdown())
    assert header == {"base_model": "org/base"}
    header, _ = header_and_body(ModelCard("t", "d", base_models=["a/b", "c/d"]).to_markdown())
    assert header == {"base_model": ["a/b", "c/d"]}


def test_the_relation_needs_a_base_model() -> None:
    header, _ = header_and_body(ModelCard("t", "d", base_models=["a/b"], relation="merge").to_markdown())
    assert header == {"base_model": "a/b", "base_model_relation": "merge"}
    header, _ = header_and_body(ModelCard("t", "d", base_models=["/home/me/x"], relation="merge").to_markdown())
    assert header is None


def test_a_section_has_its_parts_in_order() -> None:
    section = Section("Head", ["one", "two"], ["item"], ["a", "b"], [("1", "2"), ("3", "4")])
    _, body = header_and_body(ModelCard("t", "d", sections=[section], notes=["last"]).to_markdown())
    assert shown(body) == ["t", "d", "Head", "one", "two", "item", "a", "b", "1", "2", "3", "4", "Notes", "last"]


def test_a_card_that_says_little() -> None:
    header, body = header_and_body(ModelCard("t", "d").to_markdown())
    assert header is None
    assert shown(body) == ["t", "d"]


def test_code_shows_the_command_whole() -> None:
    line = command_line(["tool", "--name", "```` ` it's", "--out", "a b"])
    _, body = header_and_body(ModelCard("t", "d", invocation=line, usage=["first", "second"]).to_markdown())
    assert [token.content for token in tokens(body) if token.type == "fence"] == [f"{line}\n", "first\nsecond\n"]


def test_a_shell_takes_the_command_line_apart_again() -> None:
    words = [*HOSTILE, "", "it's", "$HOME", "`id`", "a\tb", "*", "~", "\\n\n", "'\x1b1"]
    line = command_line(["printf", "%s\\0", *words])
    assert "\n" not in line and line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words


def test_no_path_of_this_machine_is_told() -> None:
    cache = "/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123456789abcdef"
    arguments = ["/venv/bin/safelora-gguf", "extrapolate", "--base", "base/model", "--aligned", cache,
                 "--out=/home/me/my out.gguf", "--adapter", "/home/me/a.gguf=-0.5", "--x", "C:\\Users\\me\\m",
                 "--system", "/no_think", "--dir", "/home/me/"]  # fmt: skip
    assert shlex.split(command_line(arguments)) == [
        "safelora-gguf", "extrapolate", "--base", "base/model", "--aligned", "org/name",
        "--out=my out.gguf", "--adapter", "a.gguf=-0.5", "--x", "m", "--system", "/no_think", "--dir", "me",
    ]  # fmt: skip
