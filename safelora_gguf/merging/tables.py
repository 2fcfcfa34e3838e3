"""The two tables of tokens of a model, at its input and its output: what they are called, and whether they are one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from converters.changed_model import ChangedModel
from converters.checkpoint import Checkpoint
from converters.layouts import find_table
from converters.model_config import ties_of, vocabulary_of
from converters.models import Model
from converters.names import canonical

_WEIGHT = ".weight"
# Those of one line are the same table in different layouts, or in a checkpoint of a class without its head.
_EMBEDDINGS = (
    ("model.embed_tokens", "token_embd"),
    ("transformer.wte", "wte", "token_embd"),
    ("transformer.word_embeddings", "word_embeddings", "token_embd"),
    ("gpt_neox.embed_in", "embed_in", "token_embd"),
    ("model.decoder.embed_tokens", "decoder.embed_tokens", "token_embd"),  # OPT; with an encoder it is another table
    ("transformer.tokens_embed", "tokens_embed"),
    ("backbone.embeddings", "backbone.embedding", "token_embd"),
)
_HEADS = ("lm_head", "embed_out", "output")
# What llama.cpp, whose loader refuses a tensor that it doesn't expect, knows no output matrix of its own for.
_ALWAYS_TIED = frozenset({"bitnet", "cohere2", "command-r", "gemma", "gemma2", "openelm"})
# transformers' classes that end in logits for every token; the others have no output matrix.
_WITH_OUTPUT = re.compile(r"ForCausalLM|LMHead|ForMaskedLM|ForPreTraining|ForConditionalGeneration|DoubleHeads")
_HEAD_NAMES = frozenset({"lm_head", "embed_out", "embed_tokens", "shared", "wte", "word_embeddings", "vocab_projector"})
_IN_LAYERS = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Tables:
    """A model's tables of tokens.

    Attributes:
        embedding: the stored tensor; None where it goes by an unknown name.
        head: the stored tensor of the output matrix, or the name that one would have.
        stored_head: whether there is one.
        tied: whether the embedding is the output matrix, too.
        never_apart: whether the format has no place for an output matrix of its own.
        has_output: whether the model has an output matrix at all, whatever its name.
        unknown: stored tensors that may be one table for input and output, by their shape, under unknown names.
    """

    embedding: str | None
    head: str
    stored_head: bool
    tied: bool
    never_apart: bool = False
    has_output: bool = True
    unknown: frozenset[str] = frozenset()

    def has(self, module: str) -> bool:
        """Whether a module (in either layout, without `.weight`) is one of them, and is to be found."""
        return self.tensor_of(module) is not None

    def tensor_of(self, module: str) -> str | None:
        """The tensor of a module that is one of them: of the output matrix the one that it has, or would have."""
        if self.embedding is None:
            return None
        own = canonical(self.embedding).removesuffix(_WEIGHT)
        if module == own or any(module in names and own in names for names in _EMBEDDINGS):
            return self.embedding
        return self.head if module in _HEADS and (self.has_output or self.stored_head) else None

    def needed(self, module: str) -> str:
        """`tensor_of` a module that is one of them."""
        found = self.tensor_of(module)
        assert found is not None, module
        return found

    def may_be_shared(self, module: str, tensor: str | None) -> bool:
        """Whether a module may be one table for input and output of which nobody knows how they are one.

        Args:
            tensor: the stored one; None where there is none of the module's name.
        """
        if not self.unknown:
            return False
        return tensor in self.unknown or (tensor is None and module.rpartition(".")[2] in _HEAD_NAMES)


def tables_of(model: Model) -> Tables:
    """A model's tables, from its headers and its configuration."""
    by_module = {canonical(name).removesuffix(_WEIGHT): name for name in model.infos if name.endswith(_WEIGHT)}
    heads = _HEADS if model.layout == "gguf" else _HEADS[:2]
    stored = next((by_module[name] for name in heads if name in by_module), None)
    if model.layout == "gguf":
        apart = _has_no_head(model)
        return Tables(by_module.get("token_embd"), "output.weight", stored is not None, stored is None, apart)
    embedding = None if _has_encoder(model, by_module) else _embedding(by_module)
    tied = ties_of(model.config) if isinstance(model, Checkpoint | ChangedModel) else None
    output = stored is not None or _WITH_OUTPUT.search(model.model_class or "") is not None
    shared = tied is True or (tied is None and stored is None) or _has_encoder(model, by_module)
    unknown = _of_their_shape(model) if embedding is None and output and shared else frozenset[str]()
    return Tables(
        embedding,
        stored or _head_beside(embedding),
        stored is not None,
        output and (stored is None or tied is True),
        has_output=output,
        unknown=unknown,
    )


def _embedding(by_module: dict[str, str]) -> str | None:
    return next((by_module[name] for names in _EMBEDDINGS for name in names if name in by_module), None)


def _has_encoder(model: Model, by_module: dict[str, str]) -> bool:
    """Whether encoder and decoder have tables of their own, or one for both."""
    config = model.config if isinstance(model, Checkpoint | ChangedModel) else {}
    return config.get("is_encoder_decoder") is True or any(name.endswith("encoder.embed_tokens") for name in by_module)


def _of_their_shape(model: Model) -> frozenset[str]:
    rows = vocabulary_of(model.config) if isinstance(model, Checkpoint | ChangedModel) else None
    return frozenset(
        name
        for name, info in model.infos.items()
        if len(info.shape) == 2 and info.shape[0] == rows and not _IN_LAYERS.search(name)
    )


def _has_no_head(model: Model) -> bool:
    table = find_table(model)
    return model.architecture in _ALWAYS_TIED if table is None else not table.to_gguf("lm_head")


def _head_beside(embedding: str | None) -> str:
    """transformers' older files wrapped the whole text model of a composite, its head included."""
    wrapped = (embedding or "").startswith("language_model.model.")
    if embedding is not None and embedding.endswith("embed_in.weight"):
        return "embed_out.weight"
    return "language_model.lm_head.weight" if wrapped else "lm_head.weight"
