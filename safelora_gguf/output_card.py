"""What is said of an output: its model card and its Modelfile, from the report and from what its sources say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.desktop import ChatSettings, chat_settings, modelfile, ollama_name, server_line
from converters.errors import InputError
from converters.gguf_header import read_gguf_header
from converters.identity import plain_name
from converters.model_card import CardInput, ModelCard, Section, shell_word
from converters.paths import is_gguf, resolved
from converters.source_cards import SourceCard, header_license, license_lines, source_card, tags_of
from safelora_gguf.card_sections import (
    METHODS,
    changes,
    description,
    entries_of,
    is_adapter,
    measured,
    own_measurement,
    relation,
    settings,
)

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_PATH = re.compile(r"(?<![\w./:\\])(?:[A-Za-z]:\\|/)(?:[^\s/\\:,;'\"]+[/\\])+([^\s/\\:,;'\"]*)")
_UNKNOWN_MODEL = "MODEL.gguf"
_MAIN = {"project": ("aligned",), "extrapolate": ("aligned",), "convert adapter": ("base",)}
"""The input that the output is for or made of, by command; model or source for the others."""


@dataclass(frozen=True)
class MadeOutput:
    """An output with what it was made of."""

    output: Path
    report: Mapping[str, Any]
    sources: tuple[tuple[Path, SourceCard], ...]

    @property
    def is_file(self) -> bool:
        return is_file(self.output)

    @property
    def is_split(self) -> bool:
        return _SHARD.search(self.output.stem) is not None

    @property
    def cards(self) -> list[SourceCard]:
        return [card for _, card in self.sources]

    def runs_on(self) -> tuple[str, ChatSettings | None]:
        """The file name and settings of the model that is started: itself, or the one that an adapter is for."""
        if not is_adapter(self.report):
            return self.output.name, chat_settings(read_gguf_header(self.output))
        main = (path for path, card in self.sources if card.role in _main_roles(self.report))
        for path in main:
            try:
                if is_gguf(path) and path.name.isprintable():
                    return path.name, chat_settings(read_gguf_header(path, whole=False))
            except (InputError, OSError):
                continue
        return _UNKNOWN_MODEL, None

    def base_models(self) -> list[str]:
        """Repositories: the model itself where it is published, else what it says it was made from."""
        roles = _main_roles(self.report)
        main = [
            name for card in self.cards if card.role in roles for name in card.repositories or card.card.base_models
        ]
        if is_adapter(self.report):
            return main or [name for card in self.cards for name in card.card.base_models]
        return main + [name for card in self.cards if card.role == "adapter" for name in card.repositories]


def output_card(made: MadeOutput, smoke: Mapping[str, Any] | None, invocation: str | None) -> ModelCard:
    """Its card, of a checked report; see `cards.desktop_files`.

    Raises:
        FormatError: no report of a smoke test.
    """
    report, cards = made.report, made.cards
    adapter, license_ = is_adapter(report), header_license(cards)
    told, of_output = smoke or own_measurement(report), smoke is None or made.is_file
    tags = (*METHODS[str(report["command"])][1], "safelora-gguf", *(("gguf",) if made.is_file else ()))
    return ModelCard(
        title=plain_name(made.output),
        description=description(report, measured=told is not None),
        license=license_.id,
        license_name=license_.name,
        license_link=license_.link,
        base_models=made.base_models(),
        relation=relation(report),
        tags=(*tags, *tags_of(cards, of_adapter=adapter)),
        datasets=[name for card in cards if card.role == "adapter" for name in card.card.datasets],
        languages=[name for card in cards for name in card.card.languages],
        library=None if made.is_file else "peft" if adapter else "transformers",
        facts=settings(report),
        sections=[section for section in (measured(told, of_output=of_output), changes(report), licenses(cards))
                  if section is not None],
        inputs=list(_inputs(report)),
        invocation=invocation,
        notes=[*_notes(report), *_about_ollama(made)],
        usage=list(_usage(made)),
    )  # fmt: skip


def licenses(cards: Sequence[SourceCard]) -> Section | None:
    """What every source says of its license; None without sources."""
    given = {card.license for card in cards} - {None}
    told = ("The sources come under different licenses; all of them apply.",) if len(given) > 1 else ()
    return Section("Licenses", paragraphs=told, items=license_lines(cards)) if cards else None


def _inputs(report: Mapping[str, Any]) -> Iterator[CardInput]:
    for entry in entries_of(report, "inputs"):
        name, scale = plain_name(Path(str(entry.get("path")))), entry.get("scale")
        scaled = f"{name}, scale {scale:g}" if isinstance(scale, int | float) else name
        yield CardInput(str(entry.get("role")), scaled, str(entry.get("format")), str(entry.get("fingerprint")))


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    """The report's, with names instead of this machine's paths."""
    paths = {str(entry.get("path")) for entry in entries_of(report, "inputs")}
    notes = report.get("notes")
    for note in notes if isinstance(notes, list) else ():
        text = str(note)
        for path in sorted(paths, key=lambda path: (-len(path), path)):
            text = _renamed(text, path)
        yield _PATH.sub(r"\1", text)


def _renamed(text: str, path: str) -> str:
    """With a path's name in its place; what has no separator is a name already."""
    name = plain_name(Path(path))
    if not re.search(r"[/\\]", path):
        return text
    return re.sub(rf"(?<![\w/\\]){re.escape(path)}(?!\w)", lambda _: name, text)


def _about_ollama(made: MadeOutput) -> Iterator[str]:
    if made.is_file and made.is_split:
        yield "Ollama takes no split models: join the files with llama-gguf-split --merge of llama.cpp"
    if made.is_file and is_adapter(made.report):
        yield "newer versions of Ollama make no models with adapters any more, and LM Studio loads none: merge it"


def _usage(made: MadeOutput) -> Iterator[str]:
    name = made.output.name
    if not made.is_file:
        place, file = shell_word(f"./{name}"), shell_word(f"./{name}.gguf")
        yield f"safelora-gguf convert {'adapter' if is_adapter(made.report) else 'model'} {place} --out {file}"
        return
    model, chat = made.runs_on()
    adapters = [(name, 1.0)] if is_adapter(made.report) else []
    yield server_line(model, adapters=adapters, context=chat.context if chat else None)
    if not made.is_split:
        stem = stem_of(made.output)
        yield f"ollama create {ollama_name(stem)} -f {shell_word(f'./{stem}.Modelfile')}"
    asked = f"safelora-gguf smoke --model {shell_word(f'./{model}')}"
    yield asked + (f" --adapter {shell_word(f'./{name}')}" if adapters else "")


def modelfile_of(made: MadeOutput) -> str:
    """Its Modelfile. Ollama's own name for the model is made of the file's."""
    model, chat = made.runs_on()
    own, file = made.output.name, f"{stem_of(made.output)}.Modelfile"
    name = ollama_name(stem_of(made.output))
    comments = [f"Made by safelora-gguf {made.report.get('version')}. Use: ollama create {name} -f {shell_word(file)}"]
    if is_adapter(made.report):
        merge = f"safelora-gguf merge --model {shell_word(model)} --adapter {shell_word(own)} --out merged.gguf"
        comments.append(f"Put {model}, the model that the adapter is for, beside this file.")
        comments.append(f"Newer versions of Ollama (reported of 0.34.1) refuse ADAPTER. For those: {merge}")
    if chat is not None and not chat.template:
        comments.append("The model has no chat template: prompts reach it as they are.")
    elif chat is not None:
        comments.append(f"Ollama takes over chat templates that it knows; to see: ollama show --modelfile {name}")
    lines = license_lines([card for card in made.cards if card.license or card.legal_files])
    licenses = "\n".join(["All of these apply.", *lines] if len(lines) > 1 else lines)
    adapters = [own] if is_adapter(made.report) else []
    return modelfile(model, adapters=adapters, chat=chat, license_text=licenses, comments=comments)


def sources_of(report: Mapping[str, Any], given: Sequence[Path]) -> Iterator[tuple[Path, SourceCard]]:
    """The sources with what they say, each under the role that the report gives it; by default the report's inputs."""
    roles = {resolved(Path(str(entry.get("path")))): str(entry.get("role")) for entry in entries_of(report, "inputs")}
    listed = [Path(str(entry.get("path"))) for entry in entries_of(report, "inputs")]
    for path in dict.fromkeys(given or listed):  # unresolved: the hub's cache links to files named by hash
        yield path, source_card(roles.get(resolved(path), "source"), path)


def _main_roles(report: Mapping[str, Any]) -> tuple[str, ...]:
    return (*_MAIN.get(str(report.get("command")), ("model",)), "source")


def is_file(output: Path) -> bool:
    """Whether the output is, or will be, a GGUF file."""
    return output.suffix.lower() == ".gguf" and not output.is_dir()


def stem_of(output: Path) -> str:
    """A GGUF file's name without its ending, and without a shard's numbers."""
    return _SHARD.sub("", output.stem)
