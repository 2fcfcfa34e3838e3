"""Recipe files: what is read from them, and what is refused.

Oracles: the command line itself, whose own help lists the options; and literal TOML.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from converters.errors import Error, FileMissingError, FormatError, UsageError
from safelora_gguf.cli import app
from safelora_gguf.recipe.options import options_of
from safelora_gguf.recipe.reading import COMMANDS, Recipe, read_recipe

PROJECT = '[project]\nbase = "b"\naligned = "a"\nadapter = "x"\nout = "o.gguf"\n'
OF_THE_RUN = {"json", "quiet", "verbose", "force", "dry-run", "help"}


def read(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    return read_recipe(file)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"quantize"}))
def test_options_are_those_that_the_help_of_the_command_lists(command: str) -> None:
    shown = (
        CliRunner()
        .invoke(
            app, [*command.replace("convert-", "convert ").split(), "--help"], env={"COLUMNS": "250", "NO_COLOR": "1"}
        )
        .stdout
    )
    listed = set(re.findall(r"(?<=[ ,])--([a-z-]+)", "\n".join(re.findall(r"(?m)^│ .{60}", shown)))) - OF_THE_RUN
    listed = {name for name in listed if not name.startswith("no-")}
    positional = {"source"} if command.startswith("convert") else set[str]()
    assert set(options_of(COMMANDS[command])) == listed | positional
    assert len(listed) > 3


def test_steps_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    smoke = '[smoke]\nmodel = "m.gguf"\nadapter = "@project=0.5"\nmin-refusal = 1\n'
    recipe = read(tmp_path, PROJECT + smoke)
    assert [step.name for step in recipe.steps] == ["project", "smoke"]
    assert recipe.steps[1].options == {"model": "m.gguf", "adapter": ["@project=0.5"], "min-refusal": 1.0}
    assert recipe.directory == tmp_path
    assert [name for name, _ in recipe.steps[1].references()] == ["adapter"]


def test_a_command_may_stand_more_than_once(tmp_path: Path) -> None:
    step = '[[step]]\ncommand = "convert-adapter"\nsource = "{}"\nout = "{}"\n'
    recipe = read(tmp_path, step.format("a", "o") + step.format("@convert-adapter", "p"))
    assert [step.name for step in recipe.steps] == ["convert-adapter", "convert-adapter-2"]


def test_steps_may_have_names(tmp_path: Path) -> None:
    text = (
        '[[step]]\nname = "gate"\ncommand = "smoke"\nmodel = "m.gguf"\n'
        '[[step]]\ncommand = "quantize"\nsource = "m.gguf"\nout = "q.gguf"\nouttype = "Q4_K_M"\n'
    )
    assert [(step.name, step.command) for step in read(tmp_path, text).steps] == [
        ("gate", "smoke"),
        ("quantize", "quantize"),
    ]


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (PROJECT + "treshold = 0.3\n", UsageError, ("treshold", "threshold")),
        (PROJECT + "allow_noisy_reference = true\n", UsageError, ("allow-noisy-reference",)),
        (PROJECT + "force = true\n", UsageError, ("force", "run --force")),
        (PROJECT + 'threshold = "0.3"\n', UsageError, ("threshold", "a number")),
        (PROJECT + "threshold = nan\n", UsageError, ("threshold", "a number")),
        (PROJECT + "number = 2.5\n", UsageError, ("number", "whole number")),
        (PROJECT + "number = true\n", UsageError, ("number", "whole number")),
        (PROJECT + "all = 1\n", UsageError, ("all", "true or false")),
        (PROJECT + 'to = "a\\u0000b"\n', UsageError, ("to", "a text")),
        ('[project]\nbase = "b"\n', UsageError, ("lacks", "aligned", "adapter", "out")),
        ('[projekt]\nbase = "b"\n', UsageError, ("projekt", "project")),
        ("project = 3\n", UsageError, ("[project]", "a table")),
        ('[convert.model]\nsource = "x"\n', UsageError, ("convert", "convert-model")),
        ('[step]\ncommand = "smoke"\n', UsageError, ("[[step]]",)),
        ("[[step]]\n", UsageError, ("command",)),
        ('[[step]]\ncommand = "smoke"\nname = "a/b"\nmodel = "m"\n', UsageError, ("a/b",)),
        ('[smoke]\nmodel = "m"\n[[step]]\ncommand = "smoke"\n', UsageError, ("both", "smoke")),
        ('[smoke]\nmodel = "@project"\n' + PROJECT, UsageError, ("@project", "first step")),
        (PROJECT + '[smoke]\nmodel = "@merge"\n', UsageError, ("@merge", "project")),
        ("", UsageError, ("0 steps",)),
        ("[project\n", FormatError, ("TOML",)),
        ("a = " + "[" * 5000, FormatError, ("TOML",)),
        ("[[smoke]]\n" * 3, UsageError, ("[[smoke]]", "[[step]]")),
        ("[smoke]\n", UsageError, ("lacks model",)),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str, kind: type[Error], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as refused:
        read(tmp_path, text)
    for word in words:
        assert word in str(refused.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="TOML"):
        read_recipe(tmp_path / "recipe.toml")


def test_two_steps_of_one_name_are_refused(tmp_path: Path) -> None:
    step = '[[step]]\nname = "{}"\ncommand = "smoke"\nmodel = "m"\n'
    with pytest.raises(UsageError, match="two steps"):
        read(tmp_path, step.format("a") + step.format("a") + step.format("a-2"))
