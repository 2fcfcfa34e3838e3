"""What stands beside a checkpoint's weights and goes with them into a copy: tokenizer, templates, code, licenses.

Left out is what would speak of other weights than the copy's (pickles, adapters, further formats, a subdirectory with
any of these), what hides (caches, version control), and links to places outside, which a stranger's directory could
use to carry somebody's private files along. In the hub's cache every file is a link to a blob: those are followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from converters.checkpoint import INDEX, Checkpoint
from converters.errors import FileMissingError, system_reason
from converters.paths import regular_file, resolved

CARD = "README.md"

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".gguf", ".ggml", ".onnx",
    ".onnx_data", ".onnx.data", ".h5", ".keras", ".msgpack", ".npz", ".npy", ".ot", ".pb", ".tflite", ".nemo",
    ".engine", ".mlmodel", ".incomplete",
)  # fmt: skip
_KEPT_THOUGH_HIDDEN = ".gitattributes"  # says which files a hub stores apart
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json",
    "spiece.model", "sentencepiece*.model", "chat_template*",
)  # fmt: skip
_BESIDE_ONE_FILE = (
    *_TOKENIZER, "generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class Companions:
    """The files that go along.

    Attributes:
        copied: the file to read, by its path in the copy (with `/`), in order.
        left_out: what stays behind, by its path in the source; what hides is not told.
    """

    copied: Mapping[str, Path]
    left_out: tuple[str, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(regular_file(file, "a file beside the model") for file in self.copied.values())


def companions_of(source: Checkpoint) -> Companions:
    """What goes along with a checkpoint's tensors, index and config.json. The source's README.md becomes
    README.original.md, since hubs show README.md, which is the copy's own card.

    Raises:
        FileMissingError: the directory can't be looked into.
    """
    try:
        return _companions(source, source.config_file.parent)
    except OSError as error:
        told = f"can't be looked into: {system_reason(error)}"
        raise FileMissingError(told, file=error.filename or source.path) from None


def _companions(source: Checkpoint, directory: Path) -> Companions:
    own = {source.config_file.name, *(file.path.name for file in source.files)}
    if source.path.is_dir():
        own.add(INDEX)
        candidates = [entry for entry in sorted(directory.iterdir()) if entry.name not in own]
    else:
        candidates = [
            entry
            for entry in sorted(directory.iterdir())
            if entry.name not in own and not _is_directory(entry) and any(map(entry.match, _BESIDE_ONE_FILE))
        ]
    copied: dict[str, Path] = {}
    left_out = []
    for entry in candidates:
        if _hides(entry.name) and entry.name != _KEPT_THOUGH_HIDDEN:
            continue
        found = _below(entry, directory)
        if found is None:
            left_out.append(entry.name + "/" * _is_directory(entry))
            continue
        copied |= found.copied
        left_out += found.left_out
    return Companions(_renamed(copied), tuple(left_out))


def with_tokenizer(companions: Companions, directory: Path) -> Companions:
    """The same with a tokenizer's files from another directory, which take the place of those of the same names.

    Those that the other directory lacks stay: its vocabulary continues the old one, and a template it may not have.

    Raises:
        FileMissingError: the directory can't be looked into.
    """
    try:
        entries = sorted(entry for entry in directory.iterdir() if any(map(entry.match, _TOKENIZER)))
        found = {entry.name: entry for entry in entries if not _is_directory(entry) and _goes_along(entry, directory)}
    except OSError as error:
        raise FileMissingError(f"can't be looked into: {system_reason(error)}", file=directory) from None
    return Companions({**companions.copied, **found}, companions.left_out)


def is_weights(name: str) -> bool:
    """Whether a file of this name is, or describes, weights: nothing that stays true beside others."""
    lowered = name.lower()
    listed = lowered.endswith(".json") and (".safetensors.index" in lowered or ".bin.index" in lowered)
    return lowered.endswith(_WEIGHTS) or listed or lowered == "adapter_config.json"


def _below(entry: Path, root: Path) -> Companions | None:
    """What goes along of a file or a whole subdirectory; None where it stays behind."""
    if not _is_directory(entry):
        return Companions({entry.name: entry}, ()) if _goes_along(entry, root) else None
    files = list(_files_below(entry))
    if any(is_weights(file.name) for file in files):
        return None
    named = {file: PurePosixPath(file.relative_to(root)).as_posix() for file in files}
    copied = {name: file for file, name in named.items() if _goes_along(file, root)}
    return Companions(copied, tuple(name for name in named.values() if name not in copied))


def _files_below(directory: Path) -> Iterator[Path]:
    for entry in sorted(directory.iterdir()):
        if _is_directory(entry) and not _hides(entry.name):
            yield from _files_below(entry)
        elif not _hides(entry.name):
            yield entry


def _goes_along(file: Path, root: Path) -> bool:
    return not is_weights(file.name) and (not file.is_symlink() or _stays_inside(file, root)) and file.is_file()


def _is_directory(entry: Path) -> bool:
    """A link to one, which may lead round in circles, is not."""
    return not entry.is_symlink() and entry.is_dir()


def _hides(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _stays_inside(link: Path, root: Path) -> bool:
    """Whether a link leads to what would go along itself, or to a blob of the hub's cache that the directory is in."""
    place, directory = resolved(link), resolved(root)
    if directory.parent.name == "snapshots" and place.parent == directory.parent.parent / "blobs":
        return True
    if not place.is_relative_to(directory):
        return False
    return not is_weights(place.name) and not any(map(_hides, place.relative_to(directory).parts))


def _renamed(copied: Mapping[str, Path]) -> dict[str, Path]:
    """With the source's card under a name that is free: a copy of a copy has README.original.md already."""
    result = {name: file for name, file in copied.items() if name.lower() != CARD.lower()}
    free, number = "README.original.md", 2
    for name, file in copied.items():
        if name not in result:
            while free in result:
                free, number = f"README.original-{number}.md", number + 1
            result[free] = file
    return result
