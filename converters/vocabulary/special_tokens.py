"""Which tokens begin and end a text, stand for what is unknown and so on, and which of them a tokenizer adds itself.

Three files speak of it: tokenizer.json in its post-processor, tokenizer_config.json by names, config.json by numbers.
The first that says something counts, as in upstream's converter. Where a token is an object with a content, upstream
compares the object with the post-processor's text and finds that no token is added; here the content is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from converters.gguf_file import Value, entry_bytes, uint32
from converters.gguf_types import Kind
from converters.vocabulary.sources import ROLES, TokenizerSources, content_of

_PREFIX = "tokenizer.ggml."
_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"} | {
    "eot": "eot", "eom": "eom",
}  # fmt: skip
_ADDABLE = ("bos", "eos", "sep")  # of which GGUF can say that they are added


@dataclass
class SpecialTokens:
    """What is known of them.

    Attributes:
        numbers: of the tokens, by role.
        adds: whether a tokenizer adds them to a text, by role.
    """

    numbers: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)

    def entries(self) -> list[tuple[str, bytes]]:
        """The keys, in upstream's order."""
        found = [
            (f"{_PREFIX}{_KEYS[role]}_token_id", uint32(number))
            for role, number in self.numbers.items()
            if role in _KEYS
        ]
        found += [
            (f"{_PREFIX}add_{role}_token", Value(Kind.BOOL, value))
            for role, value in self.adds.items()
            if role in _ADDABLE
        ]
        return [(key, entry_bytes(key, value)) for key, value in found]


def special_tokens(sources: TokenizerSources, size: int, roles: Sequence[str] = ROLES) -> SpecialTokens:
    """The special tokens of a tokenizer with `size` tokens; numbers beyond it are left out.

    Raises:
        FormatError: an added token of tokenizer.json is malformed.
    """
    named: dict[str, str | None] = {}
    for role in (*roles, *ROLES):
        named.setdefault(role, content_of(sources.tokenizer_config.get(f"{role}_token")))
    reading = _PostProcessor(named, list(roles), configured=bool(sources.tokenizer_config))
    made = SpecialTokens()
    if sources.tokenizer_json is not None:
        reading.read(sources.tokenizer_json.section("post_processor"))
        made.adds.update(reading.adds)
    if sources.tokenizer_config:
        _add_named(made, sources, reading, size)
    for role in reading.roles:
        _add_number(made, role, _configured(sources.config, role), size)
    return made


def _add_named(made: SpecialTokens, sources: TokenizerSources, reading: _PostProcessor, size: int) -> None:
    added = sources.tokenizer_json.added if sources.tokenizer_json is not None else ()
    numbers: dict[str, int] = {}
    for token in added:
        numbers.setdefault(token.content, token.number)
    for role in reading.roles:
        adds = sources.tokenizer_config.get(f"add_{role}_token")
        if isinstance(adds, bool):
            made.adds.setdefault(role, adds)
        _add_number(made, role, numbers.get(reading.named.get(role) or ""), size)


def _add_number(made: SpecialTokens, role: str, number: Any, size: int) -> None:
    if type(number) is int and 0 <= number < size:
        made.numbers.setdefault(role, number)


def _configured(config: Mapping[str, Any], role: str) -> Any:
    """A number of config.json; that of the text model, where only that has one."""
    number, inner = config.get(f"{role}_token_id"), config.get("text_config")
    return inner.get(f"{role}_token_id") if number is None and isinstance(inner, dict) else number


@dataclass
class _PostProcessor:
    """What tokenizer.json's post-processor says; `named` are tokenizer_config.json's tokens, which it completes."""

    named: dict[str, str | None]
    roles: list[str]
    configured: bool
    adds: dict[str, bool] = field(default_factory=dict)

    def read(self, section: Mapping[str, Any]) -> None:
        if not self.named["bos"] and self.configured:
            self.named["bos"] = self.named["cls"]
        if not self.named["eos"] and self.configured:
            self.named["eos"] = self.named["sep"]
        listed = section.get("processors", [section])
        for processor in listed if isinstance(listed, list) else []:
            kind = processor.get("type") if isinstance(processor, dict) else None
            if kind == "ByteLevel":
                self.adds.setdefault("bos", False)
                self.adds.setdefault("eos", False)
            elif kind == "RobertaProcessing":
                self._roberta(processor)
            elif kind == "TemplateProcessing":
                self._template(_steps(processor.get("single")), _steps(processor.get("pair")))

    def _roberta(self, processor: Mapping[str, Any]) -> None:
        self.adds |= {"bos": True, "eos": True, "sep": True}
        for role, other in (("cls", "bos"), ("sep", "eos")):
            given = processor.get(role)
            first = given[0] if isinstance(given, list) and given else None
            self.named[role] = self.named[role] or content_of(first) or self.named[other]

    def _template(self, single: Sequence[_Step], pair: Sequence[_Step]) -> None:
        first = single[0].special if len(single) > 1 else None
        last = single[-1].special if len(single) > 1 else None
        if first:
            self._first(first)
        if last:
            self._last(last)
        if pair:
            self._pair(pair, first, last)

    def _first(self, token: str) -> None:
        if not self.configured:
            self.named["bos"] = token
        elif token not in (self.named["bos"], self.named["cls"]):
            self.named["bos"] = self.named["bos"] or token
            self.named["cls"] = self.named["cls"] or token
        self.adds["bos"] = token in (self.named["bos"], self.named["cls"])

    def _last(self, token: str) -> None:
        """The token at the end of every text is the one that ends it; what was called so ends a turn, or a message."""
        if self.configured and token != self.named["eos"]:
            other = next((role for role in ("eot", "eom") if role not in self.roles), None)
            if other is not None:
                self.roles.append(other)
                self.named[other] = self.named["eos"]
        self.named["eos"] = token
        self.adds["eos"] = True

    def _pair(self, pair: Sequence[_Step], first: str | None, last: str | None) -> None:
        """Whether a separator stands between two texts: A [sep] [eos] B."""
        start = 1 if first and pair[0].special == first else 0
        stop = len(pair) - 1 if last and pair[-1].special == last else len(pair)
        inner = pair[start:stop]
        if len(inner) < 3 or inner[0].text != "A" or inner[-1].text != "B":
            return
        middle, ends = inner[1:-1], (self.named["sep"], self.named["eos"])
        adds = middle[0].special is not None and middle[0].special in ends and not last
        if len(middle) == 2 and middle[1].special is not None and middle[1].special in ends:
            adds = True
        self.adds["sep"] = adds
        if adds and not self.named["sep"]:
            self.named["sep"] = self.named["eos"]


@dataclass(frozen=True)
class _Step:
    """A place of a template: a special token, or one of the texts, A or B."""

    special: str | None = None
    text: str | None = None


def _steps(template: Any) -> Sequence[_Step]:
    found = []
    for entry in template if isinstance(template, list) else []:
        parts = [entry.get(kind) if isinstance(entry, dict) else None for kind in ("SpecialToken", "Sequence")]
        names = [part.get("id") if isinstance(part, dict) else None for part in parts]
        special, text = (name if isinstance(name, str) and name else None for name in names)
        found.append(_Step(special, text))
    return found
