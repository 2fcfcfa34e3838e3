"""The cards that a recipe's steps wrote, brought up to what a later step measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.model_card import command_line
from converters.paths import is_there
from safelora_gguf.cards import write_desktop_files
from safelora_gguf.recipe.journal import Journal, is_as_left


def restore_cards(journal: Journal, step: str, words: Sequence[str]) -> None:
    """Writes the cards of a complete step again that somebody deleted, with what was measured since."""
    record = journal.done[step]
    if all(is_there(Path(path)) for path in record["cards"]):
        return
    output = str((record["report"].get("output") or {}).get("path"))
    kept = [(Path(path), state) for path, state in record["cards"].items() if is_there(Path(path))]
    if not all(is_as_left(path, state) for path, state in kept):
        return
    smoke = next((found["report"] for found in journal.done.values()
                  if found["report"].get("command") == "smoke"
                  and output in {str(entry.get("path")) for entry in found["report"]["inputs"]}), None)  # fmt: skip
    write_desktop_files(Path(output), record["report"], (), smoke, command_line(words), force=True)
    journal.note_cards(record, [Path(path) for path in record["cards"]])


def update_cards(journal: Journal, smoke: Mapping[str, Any], words: Sequence[str]) -> None:
    """Puts what was measured into the cards of what it was measured on; those that somebody edited stay."""
    measured = {str(entry.get("path")) for entry in smoke["inputs"]}
    for record in journal.done.values():
        output = str((record["report"].get("output") or {}).get("path"))
        cards = [(Path(path), state) for path, state in record["cards"].items()]
        if output in measured and cards and all(is_as_left(path, state) for path, state in cards):
            line = command_line(words)
            write_desktop_files(Path(output), record["report"], (), smoke, line, force=True)
            journal.note_cards(record, [path for path, _ in cards])
