"""A model directory's tokenizer as `tokenizer.*` keys, those that upstream's convert_hf_to_gguf.py writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import FileMissingError, MismatchError, UnsupportedError
from converters.gguf_file import Value, entry_bytes
from converters.gguf_types import Kind
from converters.paths import is_there
from converters.vocabulary.bpe import adds_explicitly, bpe_entries
from converters.vocabulary.chat_templates import chat_template_entries
from converters.vocabulary.sentencepiece_model import read_sentencepiece_model
from converters.vocabulary.sources import TokenizerSources
from converters.vocabulary.special_tokens import SpecialTokens, special_tokens
from converters.vocabulary.spm import spm_tokens
from converters.vocabulary.spm_json import is_like_sentencepiece, json_tokens
from converters.vocabulary.tokens import VOCAB_FROM, TokenTable, TokenType, Vocabulary, plain, shown

if TYPE_CHECKING:
    from converters.architectures.table import Architecture

_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
_ADDS_BOS = "tokenizer.ggml.add_bos_token"
_LLAMA = frozenset({"llama", "smollm3", "granite"})  # whose vocabularies upstream writes by one rule
_UNIGRAM = (
    "the SentencePiece model looks for the most likely pieces (unigram), and llama.cpp merges by their scores: some "
    "texts become other tokens"
)
_GEMMA_ROLES = ("prefix", "suffix", "middle", "fsep", "eot")
_CODE_LLAMA_ROLES = ("prefix", "suffix", "middle", "eot")


@dataclass(frozen=True)
class _Request:
    """A tokenizer's files, and the model that it is for."""

    sources: TokenizerSources
    architecture: str
    rows: int


def read_vocabulary(
    directory: Path, config: Mapping[str, Any], table: Architecture, rows: int, overlay: Path | None = None
) -> Vocabulary:
    """The vocabulary of a checkpoint's directory.

    Args:
        config: the model's config.json.
        rows: of the embedding; a shorter vocabulary is filled up with unused tokens.
        overlay: a directory whose tokenizer takes the place of the model's own, since it has more tokens; its
            tokenizer.model may be missing.

    Raises:
        FileMissingError: there is no tokenizer. FormatError: its files are damaged, or contradict each other.
        UnsupportedError: llama.cpp has nothing that does the same. MismatchError: the overlay is of another model.
    """
    if overlay is None:
        return _read(TokenizerSources(directory, config), table, rows)
    if not any(is_there(overlay / name) for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise FileMissingError("has no tokenizer, so the new tokens are not known", file=overlay)
    found = _read(TokenizerSources(overlay, config, directory), table, rows)
    try:
        own = _read(TokenizerSources(directory, config), table, rows)
    except FileMissingError:
        return found  # nothing to compare with
    _check_continues(TokenTable.of(own, directory), TokenTable.of(found, overlay))
    return found


def _check_continues(own: TokenTable, overlay: TokenTable) -> None:
    """That the tokens that the model already had are still there."""
    for number, (before, after) in enumerate(zip(own.tokens, overlay.tokens, strict=True)):
        if own.types[number] != TokenType.UNUSED and plain(before) != plain(after):
            told = f"token {number} is {shown(after)}, and {shown(before)} in {own.file}"
            raise MismatchError(f"{told}: the tokenizer of another model", file=overlay.file)


def _read(sources: TokenizerSources, table: Architecture, rows: int) -> Vocabulary:
    writing = table.writing
    kinds = ("sentencepiece", "bpe") if writing is None else writing.vocabularies
    request = _Request(sources, table.name, rows)
    prefix = None if writing is None else writing.space_prefix
    if table.name == "phi3" and sources.tokenizer_config.get("tokenizer_class") == "GPT2Tokenizer":
        kinds = ("bpe",)
    for kind in kinds:
        found = _READERS[kind](request, prefix)
        if found is not None:
            return found
    raise _missing(sources, kinds)


def _missing(sources: TokenizerSources, kinds: tuple[str, ...]) -> FileMissingError | UnsupportedError:
    if is_there(sources.directory / "tekken.json"):
        told = f"tekken.json is not read here; {VOCAB_FROM}"
        return UnsupportedError(told, file=sources.directory)
    wanted = " or ".join({"sentencepiece": "tokenizer.model", "bpe": "tokenizer.json"}[kind] for kind in kinds)
    return FileMissingError(f"has no {wanted}; add it, or {VOCAB_FROM}", file=sources.directory)


def _sentencepiece(request: _Request, prefix: bool | None) -> Vocabulary | None:
    """By tokenizer.model, or what tokenizer.json has kept of it; None where there is neither."""
    sources, path, notes = request.sources, request.sources.sentencepiece, tuple[str, ...]()
    if path is not None:
        model = read_sentencepiece_model(path)
        table, notes = spm_tokens(sources, model, request.rows, plainly=request.architecture == "phi3")
        natural, notes = model.space_prefix, (*notes, *((_UNIGRAM,) if model.unigram else ()))
    elif sources.tokenizer_json is not None and is_like_sentencepiece(sources.tokenizer_json):
        table, natural = json_tokens(sources, sources.tokenizer_json, request.rows)
    else:
        return None
    special = special_tokens(sources, request.rows)
    entries = [*table.entries("llama", "default"), *special.entries(), *chat_template_entries(sources)]
    return _finished(request, entries, notes, _prefix(request, prefix, natural=natural))


def _prefix(request: _Request, fixed: bool | None, *, natural: bool) -> bool | None:
    """What to say of a space in front of every text, which llama.cpp puts there unless told otherwise."""
    said = request.sources.tokenizer_config.get("add_prefix_space") if request.architecture in _LLAMA else None
    if fixed is not None:
        return fixed
    if isinstance(said, bool):
        return said
    return None if natural else False


def _bpe(request: _Request, _: bool | None) -> Vocabulary | None:
    tokenizer = request.sources.tokenizer_json
    if tokenizer is None:
        return None
    if tokenizer.model.get("type") != "BPE":
        told = f"its model is {tokenizer.model.get('type')!r:.40}, expected 'BPE'; {VOCAB_FROM}"
        raise UnsupportedError(told, file=tokenizer.file)
    tokens, merges, form = bpe_entries(request.sources, tokenizer, request.architecture, request.rows)
    special = adds_explicitly(special_tokens(request.sources, request.rows), form)
    entries = [*tokens, *merges, *special.entries(), *chat_template_entries(request.sources)]
    said = request.sources.tokenizer_config.get("add_prefix_space") if request.architecture in _LLAMA else None
    return _finished(request, entries, (), said if isinstance(said, bool) else None)


_READERS: Mapping[str, Callable[[_Request, bool | None], Vocabulary | None]] = {
    "sentencepiece": _sentencepiece,
    "bpe": _bpe,
}


def _finished(
    request: _Request, entries: list[tuple[str, bytes]], notes: tuple[str, ...], prefix: bool | None
) -> Vocabulary:
    """With the keys that a family has beside the common ones."""
    keys = dict(entries) | dict(_family(request).entries())
    if prefix is not None:
        keys[_SPACE_PREFIX] = _bool(_SPACE_PREFIX, prefix)
    if request.architecture in _LLAMA and _vocab_size(request) == 49152:  # Granite's code models, and what came of them
        keys[_ADDS_BOS] = _bool(_ADDS_BOS, value=False)
    return Vocabulary(tuple(keys.items()), request.rows, notes, request.sources.used())


def _family(request: _Request) -> SpecialTokens:
    """The tokens that upstream gives every model of a family, whatever its files say: Gemma's, and Code Llama's."""
    made, given = SpecialTokens(), None
    if request.architecture == "gemma":
        made, given = special_tokens(request.sources, request.rows, _GEMMA_ROLES), 107
    elif request.architecture in _LLAMA and _vocab_size(request) == 32016:
        made, given = special_tokens(request.sources, request.rows, _CODE_LLAMA_ROLES), 32010
    if given is not None and given < request.rows:
        made.numbers.setdefault("eot", given)
    return made


def _vocab_size(request: _Request) -> int:
    size = request.sources.config.get("vocab_size")
    return size if type(size) is int else request.rows


def _bool(key: str, value: bool) -> bytes:
    return entry_bytes(key, Value(Kind.BOOL, value))
