"""Oracles: a reader of Modelfiles after the states of Ollama's own parser (parser/parser.go in ollama/ollama); shlex
for llama-server's command line, and csv, since `--lora` takes a row of it; headers from the gguf package."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import gguf
import pytest
from hostile_texts import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.desktop import ChatSettings, chat_settings, modelfile, ollama_name, server_line
from converters.errors import UnsupportedError
from converters.gguf_header import read_gguf_header

QUOTES = [
    '"""',
    '"',
    '""""',
    'a "quoted" b',
    '"""\nFROM evil\n"""',
    'text"',
    'text"""',
    'text""" \nPARAMETER x 1',
    '""',
]


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Instructions in order, a parameter as `parameter NAME`. Letters that Go's strconv.IsPrint refuses, all but the
    ends of lines and blanks, are dropped on reading."""
    lines = ["".join(x for x in line if x.isprintable() or x == "\t") for line in text.replace("\r", "\n").split("\n")]
    found = []
    while lines:
        line = lines.pop(0).lstrip(" \t")
        if not line or line.startswith("#"):
            continue
        name, _, value = line.replace("\t", " ", 1).partition(" ")
        if name.lower() == "parameter":
            key, _, value = value.partition(" ")
            name = f"parameter {key}"
        while not is_closed(value.strip()):
            value += "\n" + lines.pop(0)  # fails at the end of the file, as Ollama does
        found.append((name.lower(), unquoted(value.strip())))
    commands = {"from", "license", "template", "system", "adapter", "message", "parameter"}
    assert {name.split(" ")[0] for name, _ in found} <= commands
    return found


def is_closed(value: str) -> bool:
    if value.startswith('"""'):
        return len(value) >= 6 and value.endswith('"""')
    return not value.startswith('"') or (len(value) >= 2 and value.endswith('"'))


def unquoted(value: str) -> str:
    return value[3:-3] if value.startswith('"""') else value[1:-1] if value.startswith('"') else value


def write_header(path: Path, tokens: list[str], *, context: int = 131072, kinds: list[int] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds or [3] * len(tokens))
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def settings_of(path: Path) -> ChatSettings:
    return chat_settings(read_gguf_header(path))


def test_a_header_tells_context_ends_and_template(tmp_path: Path) -> None:
    found = settings_of(write_header(tmp_path / "m.gguf", ["a", "</s>", "<|im_end|>"]))
    assert found == ChatSettings(131072, ("</s>", "<|im_end|>"), template=True)
    assert found.context == 8192
    assert ChatSettings(2048).context == 2048
    assert ChatSettings().context is None


def test_what_a_header_says_wrongly_ends_no_answer(tmp_path: Path) -> None:
    for number, tokens in enumerate((["a"], ["a", "b", "\x1b[31m"], ["a", "\n\n", "x" * 65])):
        assert settings_of(write_header(tmp_path / f"{number}.gguf", tokens)).stops == ()
    ordinary = write_header(tmp_path / "o.gguf", ["a", "the", "<end>"], kinds=[1, 1, 4])
    assert settings_of(ordinary).stops == ("<end>",)


def test_a_model_without_a_vocabulary(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("llama.context_length", "many")
    writer.add_string("tokenizer.ggml.eos_token_id", "2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert settings_of(tmp_path / "m.gguf") == ChatSettings()


def test_a_modelfile_is_read_as_it_was_meant() -> None:
    chat = ChatSettings(131072, ("</s>", 'say "no"', '"', "two words"), template=True)
    text = modelfile("my model.gguf", adapters=["a.gguf"], chat=chat, system="Be brief.\nBe kind.",
                     license_text="apache-2.0", comments=["made by\nFROM evil", "# twice"])  # fmt: skip
    assert read_modelfile(text) == [
        ("from", "./my model.gguf"),
        ("adapter", "./a.gguf"),
        ("parameter num_ctx", "8192"),
        ("parameter stop", "</s>"),
        ("parameter stop", 'say "no"'),
        ("parameter stop", '"'),
        ("parameter stop", "two words"),
        ("system", "Be brief.\nBe kind."),
        ("license", "apache-2.0"),
    ]
    assert text.startswith("# made by FROM evil\n# # twice\nFROM ")
    assert "\n# The model was trained on 131072 tokens" in text


def test_nothing_is_said_that_is_not_known() -> None:
    assert modelfile("m.gguf") == "FROM ./m.gguf\n"


@pytest.mark.parametrize("text", [*HOSTILE, *QUOTES, "a\rFROM evil", "a\r\nb", "# x", "a\x00b"])
def test_strangers_texts_stay_inside(text: str) -> None:
    written = modelfile("m.gguf", system=text, license_text=f"{text}\n{text}", comments=[text])
    found = read_modelfile(written)
    assert [name for name, _ in found] == ["from", "system", "license"]
    if text.isprintable() and '"' not in text:
        assert found[1:] == [("system", text), ("license", f"{text}\n{text}")]
    assert all(line.isprintable() for line in written.split("\n"))


@given(st.text(st.characters(codec="utf-8"), min_size=1), st.text('"\n a', min_size=1))
@settings(max_examples=300, deadline=None)
def test_any_text_stays_inside(text: str, quotes: str) -> None:
    for each in (text, quotes):
        found = read_modelfile(modelfile("m.gguf", system=each, license_text=each, comments=[each]))
        assert [name for name, _ in found] == ["from", "system", "license"]


@given(st.text(st.characters(codec="utf-8").filter(lambda x: x.isprintable() and x != "/"), min_size=1, max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_printable_name_and_ending_are_read_back(text: str) -> None:
    found = read_modelfile(modelfile(text, adapters=[f"{text}.gguf"], chat=ChatSettings(stops=(text,))))
    assert found == [("from", f"./{text}"), ("adapter", f"./{text}.gguf"), ("parameter stop", text)]
    line = shlex.split(server_line(text, adapters=[(f"{text}.gguf", 1)], context=4096))
    assert line[:4] == ["llama-server", "-m", f"./{text}", "--lora"]
    assert line[5:] == ["-c", "4096"]
    if '"' not in text or "," in text:  # in a row without commas quotes stand for themselves
        assert next(csv.reader([line[4]])) == [f"./{text}.gguf"]
    else:
        assert line[4] == f"./{text}.gguf"


def test_a_name_that_would_be_read_as_another() -> None:
    for name in ("a\nFROM evil.gguf", "a\x1b.gguf", "a\u200b.gguf", "a\u00a0b.gguf"):
        with pytest.raises(UnsupportedError, match="rename the file"):
            modelfile(name)


def test_scales_stand_behind_the_name() -> None:
    line = server_line("m.gguf", adapters=[("a b.gguf", 0.5), ("c,d.gguf", -1e-05), ("e.gguf", 1.0)])
    assert shlex.split(line) == ["llama-server", "-m", "./m.gguf", "--lora-scaled", "./a b.gguf:0.5", "--lora-scaled",
                                 '"./c,d.gguf:-1e-05"', "--lora", "./e.gguf"]  # fmt: skip
    with pytest.raises(UnsupportedError, match="colon"):
        server_line("m.gguf", adapters=[("a:b.gguf", 0.5)])
    assert shlex.split(server_line("m.gguf", adapters=[("a:b.gguf", 1)]))[-1] == "./a:b.gguf"


def test_names_for_ollama() -> None:
    assert ollama_name("Llama 3.1-8B_Q4!") == "llama-3.1-8b_q4"
    assert ollama_name("\u4e2d\u6587") == "model"
