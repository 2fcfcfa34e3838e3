"""What a checkpoint becomes in GGUF: tensors in llama.cpp's layout, hyperparameters, vocabulary, generated tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.architectures import KNOWN, Architecture
from converters.changed_model import ChangedModel
from converters.changes import Rows
from converters.checkpoint import INDEX, Checkpoint
from converters.converted_tensors import converted_tensors, truncated
from converters.errors import FileMissingError, UnsupportedError
from converters.ggml import QType
from converters.gguf_contents import GgufContents
from converters.gguf_file import entry_bytes
from converters.gguf_layout import ModelTensor, Rounded
from converters.layouts import find_table
from converters.model_keys import generated_tensors, model_keys, settings_left_out, writing_of
from converters.model_metadata import general_keys
from converters.paths import is_there
from converters.quantization import FILE_TYPES, FileType
from converters.quantized_checkpoints import refuse_quantized
from converters.scoring_models import refuse_scoring_models
from converters.vocabulary import Vocabulary, compared_with_directory, read_vocabulary, vocabulary_from_gguf

if TYPE_CHECKING:
    import torch

_EMBEDDING = "token_embd.weight"


def converted_contents(model: ChangedModel, wanted: FileType | None, vocab_from: Path | None) -> GgufContents:
    """A checkpoint, with its edits, as GGUF.

    Args:
        wanted: a plain type for all matrices; None: each keeps its own.
        vocab_from: a GGUF model whose vocabulary is taken as it is.

    Raises:
        UnsupportedError: a family, a setting or a vocabulary that can't be converted here. FormatError: something is
            missing, unknown or damaged.
    """
    stored = model.stored
    assert isinstance(stored, Checkpoint), "only checkpoints are converted"
    table = _table(model)
    _check_files(stored)
    refuse_scoring_models(_directory(stored), model.config, table.name)
    keys = model_keys(model.config, stored.config_file, table)
    lost = settings_left_out(model.config, stored.config_file, table)
    made = _generated(generated_tensors(model.config, stored.config_file, table), stored.config_file)
    found = converted_tensors(model, table, wanted)
    tensors, notes = [*made, *found.tensors], [*found.notes]
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == _EMBEDDING)
    vocabulary = _vocabulary(model, table, rows, vocab_from)
    if vocabulary.size < rows:
        tensors = truncated(tensors, vocabulary.size)
        notes.append(f"left out, {rows - vocabulary.size} rows of the embedding that no token has")
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    general = general_keys(_directory(stored), model.config, table.name, shapes, _file_type(tensors, wanted))
    entries = {key: entry_bytes(key, value) for key, value in (*general, *keys)} | dict(vocabulary.entries)
    return GgufContents(entries, tuple(tensors), found.sources, losses=(*found.losses, *lost),
                        notes=(*notes, *vocabulary.notes), reads=vocabulary.sources)  # fmt: skip


def _check_files(stored: Checkpoint) -> None:
    """That the tensors are floats, and those of the whole model.

    Raises:
        UnsupportedError: they are quantized. FileMissingError: only one of several files was named.
    """
    refuse_quantized(stored.config, stored.config_file, stored.infos)
    if not stored.path.is_dir() and is_there(stored.path.with_name(INDEX)):
        told = f"is one of the files of a model ({INDEX} is beside it); name the directory, {stored.path.parent}"
        raise FileMissingError(told, file=stored.path)


def _table(model: ChangedModel) -> Architecture:
    table = find_table(model)
    if table is not None:
        writing_of(table, model.config, model.described_by)
        return table
    known = sorted({name for entry in KNOWN if entry.writing is not None for name in entry.classes})
    raise UnsupportedError(
        f"models of the class {model.architecture} are not converted here yet ({', '.join(known)} are); take "
        f"llama.cpp's convert_hf_to_gguf.py for this first step: everything after it works from its GGUF file",
        file=model.described_by,
    )


def _vocabulary(model: ChangedModel, table: Architecture, rows: int, vocab_from: Path | None) -> Vocabulary:
    assert isinstance(model.stored, Checkpoint), "only checkpoints are converted"
    directory, overlay = _directory(model.stored), model.edits.tokenizer
    if vocab_from is None:
        return read_vocabulary(directory, model.config, table, rows, overlay=overlay)
    found = vocabulary_from_gguf(vocab_from, rows, table.name)
    notes = compared_with_directory(found, directory, model.config, table, rows, overlay=overlay)
    return replace(found, notes=(*found.notes, *notes))


def _directory(stored: Checkpoint) -> Path:
    return stored.config_file.parent


def _generated(tensors: Mapping[str, torch.Tensor], origin: Path) -> Iterator[ModelTensor]:
    for name, tensor in tensors.items():
        yield ModelTensor(name, tuple(tensor.shape), QType.F32, Rounded(_rows_of(tensor)), origin)


def _rows_of(tensor: torch.Tensor) -> Rows:
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return lambda start, stop: matrix[start:stop]


def _file_type(tensors: Sequence[ModelTensor], wanted: FileType | None) -> int:
    """llama.h's number; where matrices keep their types, that of most of their values."""
    if wanted is not None:
        return wanted.number
    sizes: Counter[int] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.qtype] += tensor.nbytes
    ((qtype, _),) = sizes.most_common(1) or [(QType.F32, 0)]
    return FILE_TYPES[QType(qtype).name].number
