"""Model cards: the README.md beside what was written, for people and for hubs.

The header is YAML that hubs read; the body says what was done, from what, and how to do it again. All text counts as a
stranger's: it can't end the header, nor add a heading, a link or a picture to the body.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from converters.identity import repository_of

Fact = str | int | float | Sequence[str]

_MARKUP = re.compile(r"[\\`*_{}\[\]<>&|~$#]|(?<=:)(?=//)|(?<=www)(?=\.)", re.IGNORECASE)  # the last two: bare links
_LEADING = re.compile(r"^(\d*)(?=[-+.)](?:\s|\Z)|[-=]+\Z)")
_ABSOLUTE = re.compile(r"([A-Za-z]:[\\/]|[\\/]+[^\\/]+[\\/]).*?(?=(=[-+.\deE]+)?\Z)", re.DOTALL)


@dataclass(frozen=True)
class CardInput:
    """One input of the run.

    Attributes:
        role: base, aligned, adapter, model.
        name: what it is called; no path of somebody's machine.
    """

    role: str
    name: str
    format: str
    fingerprint: str


@dataclass(frozen=True)
class Section:
    """A part of the body: paragraphs, then a list, then a table.

    Attributes:
        columns: the table's heads; without them there is none.
        rows: its cells, as many in each as there are columns.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    items: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def lines(self) -> Iterator[str]:
        yield from (f"## {escaped(self.heading)}", "")
        for paragraph in self.paragraphs:
            yield from (escaped(paragraph), "")
        if self.items:
            yield from (*(f"- {escaped(item)}" for item in self.items), "")
        if self.columns:
            yield from (_row(self.columns), f"|{'---|' * len(self.columns)}", *map(_row, self.rows), "")


@dataclass(frozen=True)
class ModelCard:
    """What is to be said of a model or an adapter.

    Attributes:
        title: its name.
        description: a sentence or two on what was done.
        license: an identifier, as its source gives it; `other` has a name and a link.
        base_models: what it was made from; those that are no repositories are left out.
        relation: to them, as hubs call it: adapter, finetune, merge, quantized.
        datasets, languages: as its source gives them.
        library: what hubs load it with: `transformers`, `peft`.
        facts: the settings, in order.
        sections: what else is to be told, before the notes.
        inputs: what it was made from.
        invocation: the command line, see `command_line`.
        notes: a sentence each.
        usage: command lines that run it.
    """

    title: str
    description: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_models: Sequence[str] = ()
    relation: str | None = None
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()
    languages: Sequence[str] = ()
    library: str | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)
    sections: Sequence[Section] = ()
    inputs: Sequence[CardInput] = ()
    invocation: str | None = None
    notes: Sequence[str] = ()
    usage: Sequence[str] = ()

    def to_markdown(self) -> str:
        """The whole file."""
        return "\n".join(["---", *self._header(), "---", "", *self._body()])

    def _header(self) -> Iterator[str]:
        repositories = [found for found in map(repository_of, self.base_models) if found]
        entries: dict[str, str | Sequence[str] | None] = {
            "library_name": self.library,
            "license": self.license,
            "license_name": self.license_name,
            "license_link": self.license_link,
            "base_model": repositories[0] if len(set(repositories)) == 1 else repositories,
            "base_model_relation": self.relation if repositories else None,
            "tags": self.tags,
            "datasets": self.datasets,
            "language": self.languages,
        }
        for key, value in entries.items():
            if isinstance(value, str):
                yield f"{key}: {_quoted(value)}"
            elif value:
                yield f"{key}:"
                yield from (f"- {_quoted(item)}" for item in dict.fromkeys(value))

    def _body(self) -> Iterator[str]:
        yield from (f"# {escaped(self.title)}", "", escaped(self.description), "")
        if self.invocation is not None:
            yield from ("Made with:", "", *_fenced([self.invocation]), "")
        if self.inputs:
            rows = [(one.role, one.name, one.format, one.fingerprint) for one in self.inputs]
            yield from Section("Inputs", columns=("input", "name", "format", "fingerprint"), rows=rows).lines()
        if self.facts:
            yield from ("## Settings", "")
            yield from (f"- {escaped(key)}: {escaped(fact_text(value))}" for key, value in self.facts.items())
            yield ""
        for section in self.sections:
            yield from section.lines()
        if self.notes:
            yield from Section("Notes", items=self.notes).lines()
        if self.usage:
            yield from ("## Use", "", *_fenced(self.usage), "")


def command_line(arguments: Sequence[str]) -> str:
    """A command line that a shell takes apart again, each argument as it was typed, on one line.

    Of an absolute path only the last part is kept (of one in the hub's cache, the repository): a shell makes one of
    `~/model` before anybody sees it, and nobody else has that directory. What is not printable is spelled for bash.
    """
    return " ".join(shell_word(_without_directory(argument)) for argument in arguments)


def shell_word(argument: str) -> str:
    """`shlex.quote`, but for what would not be seen or would break the line: that takes the $'...' of bash and zsh."""
    if argument.isprintable():
        return shlex.quote(argument)
    letters = (
        f"\\{letter}" if letter in "\\'" else letter if letter.isprintable() else _ansi_c(letter) for letter in argument
    )
    return f"$'{''.join(letters)}'"


def fact_text(value: Fact) -> str:
    """A fact as text; several of them with commas."""
    return str(value) if isinstance(value, str | int | float) else ", ".join(value)


def escaped(text: str) -> str:
    """A stranger's text as one line of Markdown that shows it and does nothing else; what is not printable is shown
    by its number."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in line)
    line = _MARKUP.sub(lambda match: f"\\{match[0]}", line)
    return _LEADING.sub(r"\1\\", line)  # lists, and the lines under headings


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def _quoted(text: str) -> str:
    """A YAML string on one line, in double quotes, whatever is in it."""
    text = text.encode(errors="replace").decode()  # half a surrogate pair is legal in YAML and in no file
    dumped: str = yaml.safe_dump(text, default_style='"', width=float("inf"), allow_unicode=True)
    return dumped.rstrip("\n")


def _fenced(lines: Sequence[str]) -> list[str]:
    """A code block whose fence is longer than any that stands in it."""
    shown = ["".join(letter if letter.isprintable() else "\ufffd" for letter in line) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", *shown, fence]


def _ansi_c(letter: str) -> str:
    kind = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in letter.encode(errors=kind))


def _without_directory(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    found = _ABSOLUTE.match(value)
    if found is None:
        return argument
    path, scale = found[0], value[found.end() :]
    last = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    return f"{option}{equals}{repository_of(path) or last}{scale}"
