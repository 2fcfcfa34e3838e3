"""What several adapters do to a stored model, tensor by tensor, from headers alone (and what was saved untrained)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from converters.adapters.converted import check_orientation
from converters.adapters.lora import LoraAdapter
from converters.adapters.trained_on import check_trained_on
from converters.adapters.whole import WholeTensor
from converters.changed_model import ChangedModel
from converters.checkpoint import Checkpoint
from converters.conv1d import has_conv1d
from converters.errors import InputError, MismatchError, UnsupportedError, UsageError
from converters.layouts import find_table
from converters.models import Model
from converters.names import canonical
from converters.quantized_checkpoints import refuse_quantized
from safelora_gguf.merging.pairs import PlacedPair, in_layout_of, left_out, placed_pairs
from safelora_gguf.merging.rows import OwnValues, Update
from safelora_gguf.merging.same import is_stored
from safelora_gguf.merging.tables import Tables
from safelora_gguf.pairing import within_base

_WEIGHT, _BIAS = ".weight", ".bias"
_LARGEST_SCALE = 1000.0
# What transformers' classes for other tasks than language modeling call their last layers.
_OTHER_TASKS = frozenset({
    "score", "classifier", "classifier.dense", "classifier.out_proj", "classification_head.dense",
    "classification_head.out_proj", "qa_outputs", "pre_classifier", "regression_head", "v_head.summary",
})  # fmt: skip


@dataclass
class _Parts:
    """An adapter's update of one tensor while it is collected."""

    pairs: list[PlacedPair] = field(default_factory=list)
    replaces: list[OwnValues] = field(default_factory=list)
    rows: list[OwnValues] = field(default_factory=list)
    adds: list[OwnValues] = field(default_factory=list)

    def as_update(self, adapter: int, scale: float) -> Update:
        return Update(adapter, scale, tuple(self.pairs), self.replaces[0] if self.replaces else None,
                      tuple(self.rows), tuple(self.adds))  # fmt: skip


def updates_of(
    model: Model, adapter: LoraAdapter, scale: float, number: int, tables: Tables
) -> tuple[Mapping[str, Update], LoraAdapter]:
    """What an adapter does to each tensor of a model, by stored name. A name that the model hasn't is that of a bias
    or of the output matrix.

    Args:
        number: the adapter's among the run's, from 0.

    Returns:
        The updates, and the adapter as it was seen.

    Raises:
        UnsupportedError: an aLoRA; a weight in a packed form; a part without a place.
        MismatchError: the adapter is for another model.
        FormatError: its values are not finite, or the heads can't be told.
    """
    _check_kind(adapter, model, tables)
    seen = in_layout_of(model, adapter)
    found: dict[str, _Parts] = {}
    for pair in placed_pairs(model, seen, tables):
        found.setdefault(pair.tensor, _Parts()).pairs.append(pair)
    places = _Places(model, tables, seen)
    for key, whole in seen.whole.items():
        tensor = places.of(whole, seen)
        stored = tables.embedding if tensor == tables.head and not tables.stored_head else tensor
        if whole.frozen and stored is not None and is_stored(model, stored, seen, key):
            continue
        parts = found.setdefault(tensor, _Parts())
        {"replaces": parts.replaces, "rows": parts.rows, "adds": parts.adds}[whole.kind].append(
            OwnValues(seen, key, whole)
        )
    gone = left_out(model, seen)
    if gone and not found:
        raise UnsupportedError(f"nothing of it can be merged: {'; '.join(gone)}", file=adapter.path)
    for tensor in found:
        if tensor in model.infos:
            model.check_type(tensor)
    return {tensor: parts.as_update(number, scale) for tensor, parts in found.items()}, seen


def check_floats(model: Model) -> None:
    """That the model's weights are floats, and meant as such. Of MXFP4's, where the experts alone are packed, the
    others can be merged into.

    Raises:
        UnsupportedError: they are quantized, or config.json has transformers quantize them on loading.
    """
    stored = model.stored if isinstance(model, ChangedModel) else model
    if not isinstance(stored, Checkpoint):
        return
    settings = stored.config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "mxfp4":
        refuse_quantized(stored.config, stored.config_file, stored.infos)


def check_scale(scale: float) -> None:
    """Raises UsageError for a scale that is no factor of an update."""
    if not -_LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise UsageError(f"an adapter's scale is {scale:g}, expected {-_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}")


def _check_kind(adapter: LoraAdapter, model: Model, tables: Tables) -> None:
    if adapter.invocation_tokens:
        raise UnsupportedError(
            "is an aLoRA: it acts only behind its invocation tokens, and merged it would act on every token. Keep it "
            "as an adapter, with convert adapter, for llama-server",
            file=adapter.path,
        )
    if not has_conv1d(model):
        check_orientation(adapter, model)
    check_trained_on(adapter, model)
    _check_shared(adapter, model, tables)


def _check_shared(adapter: LoraAdapter, model: Model, tables: Tables) -> None:
    """That no part of it is for a table that input and output may share, where nobody knows how they do."""
    if not tables.unknown:
        return
    names = {canonical(name).removesuffix(_WEIGHT): name for name in model.infos}
    adapted = [(pair.weight, pair.tensors[0]) for pair in adapter.pairs.values()]
    adapted += [(whole.target.removesuffix(_WEIGHT), whole.key) for whole in adapter.whole.values() if not whole.frozen]
    for module, key in adapted:
        if tables.may_be_shared(module, names.get(module)):
            raise UnsupportedError(
                f"changes the table of tokens {module}, which a {model.model_class} also has in another place (tied "
                f"weights), and what is one there is not known here: merge this adapter with PEFT, or leave that part "
                f"out",
                file=adapter.tensor_file,
                tensor=key,
            )


class _Places:
    """Where the tensors go that an adapter holds beside its pairs."""

    def __init__(self, model: Model, tables: Tables, adapter: LoraAdapter) -> None:
        self._model, self._tables = model, tables
        own = {canonical(name): name for name in model.infos}
        targets = [whole.target for whole in adapter.whole.values()]
        others = [target for target in targets if not tables.has(target.removesuffix(_WEIGHT))]
        self._names = own if model.layout == "gguf" else within_base(own, others)
        self._table = None if model.layout == "gguf" else find_table(model)
        self._other_names: dict[tuple[str, ...], str] | None = None

    def of(self, whole: WholeTensor, adapter: LoraAdapter) -> str:
        """The stored tensor, or the name of a new one.

        Raises:
            MismatchError: the model has no such tensor, or in another shape.
        """
        module = whole.target.removesuffix(_WEIGHT)
        if whole.target.endswith(_WEIGHT) and self._tables.has(module):
            tensor = self._tables.needed(module)
            self._check_width(whole, adapter)
            return tensor
        found = self._names.get(whole.target) or self._by_another_name(whole.target)
        if found is None:
            owner = self._names.get(f"{whole.target.removesuffix(_BIAS)}{_WEIGHT}")
            if not whole.target.endswith(_BIAS) or owner is None:
                self._refuse_other_form(whole, adapter)
                raise self._unknown(whole, adapter)
            expected, found = self._model.infos[owner].shape[:-1], f"{owner.removesuffix(_WEIGHT)}{_BIAS}"
        else:
            expected = self._model.infos[found].shape
        if whole.kind != "rows" and whole.shape != expected:
            self._refuse_shape(whole, expected, adapter)
        return found

    def _refuse_other_form(self, whole: WholeTensor, adapter: LoraAdapter) -> None:
        """Experts have two forms: a tensor for all, or one for each."""
        if self._table is None:
            return
        wanted = {name for name, _ in self._table.tensors_in_gguf(whole.target)}
        for own in self._names:
            if any(name in wanted for name, _ in self._table.tensors_in_gguf(own)):
                raise UnsupportedError(
                    f"was trained whole, as {whole.target}, which {self._model.path} has cut otherwise, in {own}: "
                    f"merge it into a GGUF file of the model (safelora-gguf convert model)",
                    file=adapter.tensor_file,
                    tensor=whole.key,
                )

    def _unknown(self, whole: WholeTensor, adapter: LoraAdapter) -> InputError:
        model = f"{self._model.path} (a {self._model.model_class or self._model.architecture})"
        if not adapter.pairs:
            told = f"is for {whole.target}, which {model} hasn't: the adapter is for another model"
            return MismatchError(told, file=adapter.tensor_file, tensor=whole.key)
        if whole.target.rpartition(".")[0] in _OTHER_TASKS:
            told = (
                f"was trained whole, as {whole.target}, the head of another task, and {model} has none: name the model "
                f"with that head (of the class that the adapter was trained as), or leave it out of the adapter"
            )
        else:
            told = (
                f"was trained whole, as {whole.target}, which {model} doesn't store: it is another tensor's once more "
                f"(tied weights), belongs to another class, or the adapter to another model. Merge it with PEFT, or "
                f"leave it out of the adapter"
            )
        return UnsupportedError(told, file=adapter.tensor_file, tensor=whole.key)

    def _check_width(self, whole: WholeTensor, adapter: LoraAdapter) -> None:
        assert self._tables.embedding is not None, "a table is there"
        expected = self._model.infos[self._tables.embedding].shape
        if len(whole.shape) != len(expected) or whole.shape[1:] != expected[1:]:
            self._refuse_shape(whole, expected, adapter)

    def _refuse_shape(self, whole: WholeTensor, expected: Sequence[int], adapter: LoraAdapter) -> None:
        raise MismatchError(
            f"has the shape {list(whole.shape)}, and {whole.target} in {self._model.path} has {list(expected)}: the "
            f"adapter is for another model",
            file=adapter.tensor_file,
            tensor=whole.key,
        )

    def _by_another_name(self, target: str) -> str | None:
        """The tensor that is the same one in GGUF: transformers' names in memory are not always its files'."""
        if self._table is None:
            return None
        if self._other_names is None:
            found = ((self._in_gguf(canonical(name)), name) for name in self._model.infos)
            self._other_names = {key: name for key, name in found if key}
        key = self._in_gguf(target)
        return self._other_names.get(key) if key else None

    def _in_gguf(self, tensor: str) -> tuple[str, ...]:
        assert self._table is not None, "asked of a table alone"
        return tuple(f"{name} {place.expert} {place.rule.transforms} {place.rule.stacked}"
                     for name, place in self._table.tensors_in_gguf(tensor))  # fmt: skip
