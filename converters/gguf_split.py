"""A GGUF file cut into shards, `NAME-00001-of-00003.gguf`: what llama-gguf-split does, in constant memory."""

from __future__ import annotations

from pathlib import Path

from converters.gguf_rewrite import gguf_parts
from converters.gguf_shards import read_gguf_headers
from converters.gguf_stream import Progress, check_gguf_target, write_gguf_model


def split_gguf(
    source: Path, target: Path, max_size: int, *, force: bool = False, progress: Progress | None = None
) -> list[Path]:
    """Writes a model, a file or the first of its shards, again in files of at most `max_size` bytes.

    Tensors are copied as they are, of whatever type; a model that fits into one file becomes `target` itself.

    Returns:
        The files, first the one to be loaded.

    Raises:
        FormatError, FileMissingError, UnsupportedError: see `read_gguf_headers` and `gguf_parts`.
        UsageError, OutputPathError, WriteError: see `write_gguf_model`.
    """
    parts = gguf_parts(read_gguf_headers(source, "GGUF model"))
    files = check_gguf_target(target, parts.entries, parts.tensors, alignment=parts.alignment, force=force,
                              split_max_size=max_size)  # fmt: skip
    write_gguf_model(target, parts.entries, parts.tensors, alignment=parts.alignment, force=force,
                     split_max_size=max_size, progress=progress)  # fmt: skip
    return files
