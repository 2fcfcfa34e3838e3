"""Output matrices of checkpoints whose family has none in llama.cpp: it computes with the embedding in their place.

Left out, such a matrix is no loss where it is the embedding once more, and another model where it is not.
"""

from __future__ import annotations

from converters.changed_model import ChangedModel
from converters.errors import FormatError, UnsupportedError
from converters.model_config import ties_of
from converters.names import canonical

_EMBEDDING = "model.embed_tokens.weight"
_AT_ONCE = 1024  # rows


def check_head(model: ChangedModel, head: str | None, architecture: str) -> str | None:
    """Whether a model's output matrix can be left out.

    transformers takes a stored one that differs from the embedding for the model's own, whatever config.json says of
    ties.

    Args:
        head: its name in the model; None where there is none.
        architecture: GGUF's name of it.

    Returns:
        What is to be said of it.

    Raises:
        UnsupportedError: it is not the embedding. FormatError: there is none, and config.json says that it isn't.
    """
    if head is None:
        if ties_of(model.config) is False:
            told = "the model is incomplete: it has no lm_head.weight; fetch it again, or, if its output matrix is the "
            raise FormatError(f"{told}embedding, set tie_word_embeddings to true in {model.described_by.name}",
                              file=model.path, tensor="lm_head.weight")  # fmt: skip
        return None
    if not _is_embedding(model, head):
        raise UnsupportedError(
            f"is another matrix than the embedding, and llama.cpp's {architecture} has no place for one: its output "
            f"would be another model's. Such a model has to stay in Hugging Face's format",
            file=model.file_of(head),
            tensor=head,
        )
    return f"left out: {head}, which is the embedding once more"


def _is_embedding(model: ChangedModel, head: str) -> bool:
    """Value for value; of changed ones, which nobody knows yet, that they stay tied and come from the same values."""
    import torch

    stored, changes = model.stored, model.edits.changes
    table = next((name for name in stored.infos if canonical(name) == _EMBEDDING), None)
    if table is None or head not in stored.infos or stored.infos[table].shape != stored.infos[head].shape:
        return False
    if (table in changes) != (head in changes) or (head in changes and ties_of(model.config) is not True):
        return False
    count = stored.infos[head].shape[0]
    for start in range(0, count, _AT_ONCE):
        stop = min(start + _AT_ONCE, count)
        if not torch.equal(stored.rows(table, start, stop).float(), stored.rows(head, start, stop).float()):
            return False
    return True
