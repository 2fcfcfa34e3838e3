"""Output matrices of checkpoints whose family has none in llama.cpp: it computes with the embedding in their place.

Left out, such a matrix is no loss where it is the embedding once more, and another model where it is not.
"""

from __future__ import annotations

from converters.changed_model import ChangedModel
from converters.errors import UnsupportedError
from converters.model_config import ties_of
from converters.names import canonical

_EMBEDDING = "model.embed_tokens.weight"
_AT_ONCE = 1024  # rows


def check_head(model: ChangedModel, head: str, architecture: str) -> str:
    """Whether a model's output matrix can be left out.

    Args:
        head: its name in the model.
        architecture: GGUF's name of it.

    Returns:
        What is to be said of it.

    Raises:
        UnsupportedError: it is not the embedding.
    """
    if head not in model.edits.changes and ties_of(model.config) is True:
        return f"left out: {head}, which config.json ties to the embedding"
    if head in model.edits.changes or not _is_embedding(model, head):
        raise UnsupportedError(
            f"is another matrix than the embedding, and llama.cpp's {architecture} has no place for one: its output "
            f"would be another model's. Such a model has to stay in Hugging Face's format",
            file=model.file_of(head),
            tensor=head,
        )
    return f"left out: {head}, which is the embedding once more"


def _is_embedding(model: ChangedModel, head: str) -> bool:
    """Value for value, as they are stored."""
    import torch

    table = next((name for name in model.infos if canonical(name) == _EMBEDDING), None)
    if table is None or table in model.edits.changes or model.infos[table].shape != model.infos[head].shape:
        return False
    count = model.infos[head].shape[0]
    for start in range(0, count, _AT_ONCE):
        stop = min(start + _AT_ONCE, count)
        if not torch.equal(model.rows(table, start, stop).float(), model.rows(head, start, stop).float()):
            return False
    return True
