"""The one place where a model is turned into files: a stored model and its edits in, a checked plan of the output out.

    checkpoint -> directory     shards as they were, see `converters.checkpoint_output`
    checkpoint -> GGUF          through the family's table, see `converters.model_output_converted`
    GGUF -> GGUF                keys and tensors as they were, see `converters.gguf_contents`

GGUF in a type that mixes several goes through llama.cpp's quantizer afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converters.changed_model import ChangedModel
from converters.changes import Edits
from converters.checkpoint import Checkpoint
from converters.errors import UsageError
from converters.gguf_contents import GgufContents, check_requantizing, stored_contents, with_vocabulary
from converters.gguf_file import entry_bytes, uint32
from converters.gguf_model import GgufModel
from converters.model_output_directory import DirectoryOutput
from converters.model_output_gguf import GgufOutput
from converters.model_request import ModelOutput, ModelRequest, PlannedTensor
from converters.models import Model
from converters.quantization import FileType, file_type

__all__ = ["ModelOutput", "ModelRequest", "PlannedTensor", "plan_model_output"]

_EMBEDDING = "token_embd.weight"


def plan_model_output(model: Model, edits: Edits, request: ModelRequest, inputs: Sequence[Path] = ()) -> ModelOutput:
    """Checks that a model can be written as asked; reads headers and the vocabulary, no tensors.

    Args:
        model: a `Checkpoint`, a `GgufModel`, or one of them seen through a `ChangedModel`.
        edits: in what the output differs from `model`. New values are asked for in `write`, in another thread.
        inputs: files and directories that the run reads beside the model: none of them is overwritten.

    Raises:
        UsageError: an unknown type, or options that don't fit the output's form.
        UnsupportedError, FormatError, MismatchError: the model, or something in it, can't be written so.
        MissingLlamaError: the quantizer is needed and not there. OutputPathError: the place is taken or unusable.
    """
    changed = ChangedModel(model, edits)
    stored = changed.stored
    reads = [*inputs, stored.path, *stored.sources]
    if not request.is_gguf:
        if isinstance(stored, GgufModel):
            raise UsageError(f"{stored.path} is GGUF, from which no safetensors are made: --out must end in .gguf")
        return DirectoryOutput(stored, changed.edits, request, inputs)
    wanted = None if request.keeps else file_type(str(request.outtype))
    plain, quantized = (wanted, None) if wanted is None or wanted.plain else (None, wanted)
    if isinstance(stored, Checkpoint):
        from converters.model_output_converted import converted_contents

        contents = converted_contents(changed, plain, request.vocab_from)
    else:
        contents = _rewritten(changed, request, plain, quantized)
    return GgufOutput(contents, request, quantized, reads)


def _rewritten(
    model: ChangedModel, request: ModelRequest, plain: FileType | None, quantized: FileType | None
) -> GgufContents:
    wanted = plain or quantized
    if wanted is not None and not request.allow_requantize:
        check_requantizing(model, wanted)
    contents = stored_contents(model, plain, floats=quantized is not None)
    if request.vocab_from is None and model.edits.tokenizer is None:
        return contents
    return _with_other_tokens(contents, model, request.vocab_from)


def _with_other_tokens(contents: GgufContents, model: ChangedModel, vocab_from: Path | None) -> GgufContents:
    """With the vocabulary of another file, or continued by that of a directory."""
    from converters.vocabulary import check_same_as_stored, extended_vocabulary, vocabulary_from_gguf

    assert isinstance(model.stored, GgufModel), "a checkpoint's vocabulary is read with its keys"
    header, rows = model.stored.headers[0], model.infos[_EMBEDDING].shape[0]
    if vocab_from is not None:
        found = vocabulary_from_gguf(vocab_from, rows, model.architecture)
        check_same_as_stored(found, header)
    else:
        assert model.edits.tokenizer is not None, "one of the two is given"
        found = extended_vocabulary(header, model.edits.tokenizer, rows)
    entries = with_vocabulary(contents.entries, dict(found.entries))
    size = f"{model.architecture}.vocab_size"
    if size in entries:
        entries[size] = entry_bytes(size, uint32(rows))
    return replace(contents, entries=entries, notes=(*contents.notes, *found.notes), reads=found.sources)
