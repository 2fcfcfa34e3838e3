"""What desktop programs are started with: Ollama's Modelfile, and the command line of llama-server.

    # comment                     a Modelfile's grammar, as Ollama's parser/parser.go has it
    NAME value                    up to the end of the line, without the blanks around it
    NAME "value"                  the quotes are taken off; there are no escapes inside
    NAME \"""several lines\"""      ends where a line ends with the three quotes
    PARAMETER name value          `stop` may stand several times

Letters that are not printable vanish when Ollama reads them, so a name that has one can't be written there.

Left out: TEMPLATE. Ollama takes the chat template from the GGUF file, as far as it knows the template, and a guess here
would replace the one that the model was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converters.errors import UnsupportedError
from converters.gguf_metadata import MAX_ITEMS, MAX_VALUE, GgufHeader, brief_text
from converters.gguf_types import Kind
from converters.model_card import shell_word

_ENDS = ("eos", "eot", "eom")
_SPECIAL = (3, 4)  # token types: control, user-defined
_LONGEST_CONTEXT = 8192  # tokens; all that newer models were trained on would take more memory than most desktops have
_LONGEST_STOP = 64
_QUOTES = re.compile(r'"{3,}|\A"+|"+\Z')


@dataclass(frozen=True)
class ChatSettings:
    """What a GGUF model's header says about its use in conversations.

    Attributes:
        trained_context: tokens that it was trained on; None where it doesn't say.
        stops: the special tokens that end an answer.
        template: whether it has a chat template.
    """

    trained_context: int | None = None
    stops: tuple[str, ...] = ()
    template: bool = False

    @property
    def context(self) -> int | None:
        """Tokens to begin with: as trained, but no more than an ordinary desktop has memory for."""
        return None if self.trained_context is None else min(self.trained_context, _LONGEST_CONTEXT)


def chat_settings(header: GgufHeader) -> ChatSettings:
    """The settings of a model, from the header of its (first) file. What is stored in an unusual way is left out."""
    length = _number(header, f"{brief_text(header, 'general.architecture')}.context_length")
    return ChatSettings(
        length or None, tuple(dict.fromkeys(_stops(header))), "tokenizer.chat_template" in header.entries
    )


def modelfile(
    model: str,
    *,
    adapters: Sequence[str] = (),
    chat: ChatSettings | None = None,
    system: str | None = None,
    license_text: str | None = None,
    comments: Sequence[str] = (),
) -> str:
    """A Modelfile for Ollama.

    Args:
        model, adapters: names of GGUF files that stand beside the Modelfile.
        chat: of the model, where it is known.
        license_text: may have several lines, as `system` may. Quotes that would end the text early become
            apostrophes, what is not printable is spelled.
        comments: lines for its reader.

    Raises:
        UnsupportedError: a name that Ollama would read as another.
    """
    lines = [f"# {_spelled(' '.join(comment.split()))}" for comment in comments]
    lines += [f"FROM {_file(model)}", *(f"ADAPTER {_file(adapter)}" for adapter in adapters)]
    if chat is not None and chat.context is not None:
        if chat.trained_context != chat.context:
            lines.append(f"# The model was trained on {chat.trained_context} tokens, which take more memory.")
        lines.append(f"PARAMETER num_ctx {chat.context}")
    lines += [f"PARAMETER stop {_value(stop)}" for stop in (chat.stops if chat else ())]
    lines += [f"{name} {_block(text)}" for name, text in (("SYSTEM", system), ("LICENSE", license_text)) if text]
    return "\n".join([*lines, ""])


def server_line(model: str, *, adapters: Sequence[tuple[str, float]] = (), context: int | None = None) -> str:
    """The command line of llama-server, quoted for a POSIX shell (bash or zsh where a name is not printable).

    Args:
        model: the name of a GGUF file in the working directory, or of the first shard of a split one.
        adapters: names and scales of GGUF adapters there.
        context: tokens; the server's own default is all that the model was trained on.

    Raises:
        UnsupportedError: an adapter whose name has a colon, with a scale.
    """
    words = ["llama-server", "-m", f"./{model}"]
    for name, scale in adapters:
        if scale == 1:
            words += ["--lora", _listed(f"./{name}")]
        elif ":" in name:
            raise UnsupportedError("llama-server takes NAME:SCALE and no other colon; rename the adapter", file=name)
        else:
            words += ["--lora-scaled", _listed(f"./{name}:{float(scale)!r}")]
    return " ".join(map(shell_word, [*words, *(["-c", str(context)] if context else [])]))


def ollama_name(name: str) -> str:
    """A name that Ollama takes for a model, made of a file's."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("._-")[:80] or "model"


def _file(name: str) -> str:
    if not name.isprintable():
        raise UnsupportedError("has letters in its name that Ollama can't read; rename the file", file=ascii(name))
    return f"./{name}" if name == name.rstrip() else f'"./{name}"'


def _value(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _block(text: str) -> str:
    """Several lines as one value, which nothing in them can end."""
    shown = "\n".join(_spelled(line.replace("\t", " ")) for line in text.splitlines())
    shown = _QUOTES.sub(lambda found: "'" * len(found[0]), shown)
    return f'"""{shown}"""'


def _spelled(text: str) -> str:
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)


def _listed(item: str) -> str:
    """One item of an option that takes several, with commas between them as in a CSV file."""
    return '"' + item.replace('"', '""') + '"' if "," in item else item


def _stops(header: GgufHeader) -> Iterator[str]:
    ids = [_number(header, f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    if all(found is None for found in ids):
        return
    tokens, types = _array(header, "tokens"), _array(header, "token_type")
    for place in ids:
        if place is None or place >= len(tokens) or (place < len(types) and types[place] not in _SPECIAL):
            continue
        token = tokens[place]
        if isinstance(token, str) and 1 < len(token) <= _LONGEST_STOP and token.isprintable():
            yield token


def _array(header: GgufHeader, name: str) -> list[object]:
    entry = header.entries.get(f"tokenizer.ggml.{name}")
    if entry is None or entry.kind is not Kind.ARRAY or entry.nbytes > MAX_VALUE or entry.count > MAX_ITEMS:
        return []
    found: list[object] = header.value(f"tokenizer.ggml.{name}")
    return found


def _number(header: GgufHeader, key: str) -> int | None:
    entry = header.entries.get(key)
    if entry is None or entry.kind not in (Kind.UINT32, Kind.INT32, Kind.UINT64, Kind.INT64):
        return None
    value = header.value(key)
    return value if isinstance(value, int) and value >= 0 else None
