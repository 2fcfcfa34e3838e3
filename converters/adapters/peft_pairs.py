"""The tensors of a PEFT adapter sorted into pairs, from its header and its configuration alone."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.adapters.gguf_pairs import MAX_PAIRS
from converters.adapters.lora import LoraPair
from converters.adapters.peft_config import Meaning, PeftConfig
from converters.adapters.peft_losses import BesidePairs, sort_beside_pairs
from converters.adapters.peft_parameters import Tell, count_experts, parameters_behind, stop
from converters.errors import FormatError, InputError, UnsupportedError
from converters.names import canonical, natural_order
from converters.safetensors_file import SafetensorsFile

PREFIX = "base_model.model."
_LINEAR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
_FROZEN = re.compile(r"(.+)(?<!\.token_adapter)\.base_layer\.weight")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.[^.]+)?")
_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_MOST_LETTERS = 8_000_000  # in the names of all matrices; 100,000 of a real model have half of that
_MOST_NUMBERS = 16  # in a module's name; real ones have three
_NUMBER = re.compile(r"[0-9]+")

Halves = dict[tuple[str, bool], dict[str, list[str]]]
"""Names of lora_A and lora_B by module, and by whether it is an embedding."""


@dataclass(frozen=True)
class PairKeys:
    """The tensor names of one pair.

    Attributes:
        key: the module's name in the file.
        parameter: the full name of the parameter that the pair is for, where it is not the module's own weight.
    """

    key: str
    a: str
    b: str
    embedding: bool
    parameter: str | None

    @property
    def matched(self) -> str:
        """What PEFT matches its patterns against."""
        return self.parameter or self.key

    @property
    def weight(self) -> str:
        """The weight's name in the layout, without `.weight`."""
        return canonical(self.key if self.parameter is None else self.parameter.removesuffix(".weight"))


def sort_tensors(file: SafetensorsFile, config: PeftConfig, tell: Tell = stop) -> tuple[list[PairKeys], BesidePairs]:
    """A file's tensors grouped into pairs, and those that belong to none.

    Args:
        tell: about what can't be used, which is then left out.

    Raises:
        FormatError: half a pair, or none at all.
        UnsupportedError: a tensor is nothing known.
    """
    found, others = _halves(file, config)
    beside, unknown = BesidePairs({}), list[str]()
    try:
        beside, unknown = sort_beside_pairs(others, config, file.path)
    except InputError as error:
        tell(error)
    for name in unknown:
        tell(_foreign_tensor(name, config, file.path))
    if not found:
        held = f", only what pairs can't hold: {beside}" if beside.names else ""
        tell(FormatError(f"holds no LoRA pairs{held}", file=file.path))
    halves = {}
    for module, names in found.items():
        try:
            halves[module] = _both_halves(module[0], names, file.path)
        except InputError as error:
            tell(error)
    linear = [module for module, embedding in halves if not embedding]
    parameters = parameters_behind(linear, config.target_parameters, file.path, tell)
    pairs = [
        PairKeys(module, *names, embedding, None if embedding else parameters[module])
        for (module, embedding), names in halves.items()
        if embedding or module in parameters
    ]
    return pairs, beside


def _halves(file: SafetensorsFile, config: PeftConfig) -> tuple[Halves, dict[str, str]]:
    """What is named as half a pair, and what else there is: by name, the name without PEFT's prefix."""
    found: Halves = defaultdict(lambda: {"A": [], "B": []})
    others = {}
    for key in file.infos:
        plain = key.removeprefix(PREFIX)
        match = _LINEAR.fullmatch(plain) or _EMBEDDING.fullmatch(plain)
        if match is not None:
            found[match[1], ".lora_embedding_" in plain][match[2]].append(key)
        elif not _FROZEN.fullmatch(plain) and not (config.use_dora and _MAGNITUDE.fullmatch(plain)):
            others[key] = plain
    return found, others


def pairs_by_module(
    file: SafetensorsFile, keys: Sequence[PairKeys], meanings: Mapping[str, Meaning], tell: Tell = stop
) -> dict[str, LoraPair]:
    """A pair for each matrix, in the order of their names, numbers counted as numbers, an expert after the other.

    Args:
        meanings: what the configuration says, by `matched`. What it says nothing about has its tensors' own rank and
            no scaling (NaN), and is left out if it may be a stack.
        tell: about what can't be used, which is then left out.

    Raises:
        FormatError: tensors contradict each other or the configuration, or there are more than any model has.
        UnsupportedError: they are of a type that can't be read, or for a table as a bare parameter.
    """
    found: dict[str, LoraPair] = {}
    letters = 0
    for each, weight in _in_order(keys, file.path, tell):
        try:
            pairs = _pairs(file, each, weight, meanings.get(each.matched))
            letters += len(pairs) * len(weight)
            _check_number(len(found) + len(pairs), letters, file.path)
            for pair in pairs:
                if found.setdefault(pair.module, pair) is not pair:
                    raise FormatError("two pairs for one module", file=file.path, tensor=pair.tensors[1])
        except InputError as error:
            tell(error)
            if error.tensor is None:  # too many: the others only add to that
                break
    return found


def _in_order(keys: Sequence[PairKeys], path: Path, tell: Tell) -> list[tuple[PairKeys, str]]:
    """Pairs with their weights' names, sorted by those."""
    named = []
    for each in keys:
        weight = each.weight
        if len(_NUMBER.findall(weight)) <= _MOST_NUMBERS:
            named.append((each, weight))
        else:
            told = f"has over {_MOST_NUMBERS} numbers in its name, more than any module of a model"
            tell(FormatError(told, file=path, tensor=each.a))
    return sorted(named, key=lambda item: natural_order(item[1]))


def _check_number(pairs: int, letters: int, path: Path) -> None:
    if pairs > MAX_PAIRS:
        raise FormatError(f"describes over {MAX_PAIRS} matrices, more than any model has", file=path)
    if letters > _MOST_LETTERS:
        told = f"describes matrices whose names have over {_MOST_LETTERS} letters, more than any model's"
        raise FormatError(told, file=path)


def _pairs(file: SafetensorsFile, keys: PairKeys, weight: str, meaning: Meaning | None) -> Sequence[LoraPair]:
    """The pair of an ordinary weight, or one for each matrix of a stack."""
    rows_a, columns = _matrix(file, keys.a)
    rows, columns_b = _matrix(file, keys.b)
    if rows_a != columns_b:
        what = "rank" if keys.parameter is None else "all experts' ranks together"
        told = f"A has {what} {rows_a}, B has {what} {columns_b}"
        raise FormatError(told, file=file.path, tensor=keys.b)
    if meaning is None:
        if keys.parameter is not None:
            return ()
        meaning = Meaning(rows_a, math.nan)
    shape = (columns, rows) if keys.embedding else (rows, columns)
    rank, scaling, halves = meaning.rank, meaning.scaling, (keys.a, keys.b)
    experts = _experts(keys, rows_a, rank, file.path)
    if experts is None:
        return (LoraPair(weight, keys.key, halves, rank, scaling, shape, keys.embedding),)
    return [
        LoraPair(f"{weight}[{expert}]", keys.key, halves, rank, scaling, shape, expert=expert)
        for expert in range(experts)
    ]


def _experts(keys: PairKeys, rows: int, rank: int, path: Path) -> int | None:
    """How many experts a pair's tensors are for, by the rows of A; None for an ordinary weight."""
    if keys.parameter is None:
        if rows != rank:
            told = f"has rank {rows}, and adapter_config.json gives it {rank}: they do not belong together"
            raise FormatError(told, file=path, tensor=keys.a)
        return None
    count = count_experts(rows, rank, path, keys.a)
    if count == 1 and keys.weight.rpartition(".")[2] in _TABLES:
        told = (
            "is a pair on an embedding by target_parameters, which is not supported: merge the adapter into its model "
            "(PEFT's merge_and_unload)"
        )
        raise UnsupportedError(told, file=path, tensor=keys.a)
    return count if count > 1 else None


def _matrix(file: SafetensorsFile, key: str) -> tuple[int, int]:
    shape = file.infos[key].shape
    if len(shape) != 2 or 0 in shape:
        raise FormatError(
            f"has the shape {list(shape)}, expected a matrix: saved by DeepSpeed ZeRO-3 or FSDP without gathering "
            f"its weights? Save it again from the training script",
            file=file.path,
            tensor=key,
        )
    file.check_type(key)
    return shape[0], shape[1]


def frozen_tables(file: SafetensorsFile) -> dict[str, str]:
    """Tensor names of base weights that were saved along, by canonical module."""
    found = {key: _FROZEN.fullmatch(key.removeprefix(PREFIX)) for key in file.infos}
    return {canonical(match[1]): key for key, match in found.items() if match is not None}


def magnitudes(file: SafetensorsFile, pairs: Mapping[str, LoraPair], tell: Tell = stop) -> dict[str, str]:
    """DoRA's tensors by module.

    Raises:
        FormatError: a module has none, or not one value for every row (for every column of an embedding).
    """
    found = {key: _MAGNITUDE.fullmatch(key.removeprefix(PREFIX)) for key in file.infos}
    lengths = {canonical(match[1]): key for key, match in found.items() if match is not None}
    for module, pair in pairs.items():
        try:
            if not pair.expert:  # a stack's first speaks for all
                _check_magnitudes(file, pair, lengths.get(module))
        except InputError as error:
            tell(error)
    stray = lengths.keys() - pairs.keys()
    if stray:  # not those of pairs that were told of
        halves = (_LINEAR.fullmatch(key.removeprefix(PREFIX)) for key in file.infos)
        stray -= {canonical(match[1]) for match in halves if match is not None}
    for module in sorted(stray):
        tell(FormatError("has magnitudes and no pair", file=file.path, tensor=lengths[module]))
    return lengths


def _check_magnitudes(file: SafetensorsFile, pair: LoraPair, key: str | None) -> None:
    if key is None:
        raise FormatError("has no magnitudes, and the adapter is DoRA", file=file.path, tensor=pair.tensors[0])
    count, what = (pair.shape[1], "columns") if pair.embedding else (pair.shape[0], "rows")
    if file.infos[key].elements != count:
        told = f"has {file.infos[key].elements} values, expected one for each of {count} {what}"
        raise FormatError(told, file=file.path, tensor=key)
    file.check_type(key)


def _both_halves(module: str, halves: Mapping[str, Sequence[str]], path: Path) -> tuple[str, str]:
    for half, other in (("A", "B"), ("B", "A")):
        if not halves[half]:
            message = f"has a lora_{other} but no lora_{half}: the file is incomplete"
            raise FormatError(message, file=path, tensor=halves[other][0])
        if len(halves[half]) > 1:
            raise FormatError(f"{module} has several adapters in one file", file=path, tensor=halves[half][1])
    return halves["A"][0], halves["B"][0]


def _foreign_tensor(key: str, config: PeftConfig, path: Path) -> InputError:
    if "lora_magnitude_vector" in key and not config.use_dora:
        told = (
            f"holds DoRA magnitudes, and {config.path.name} has no use_dora: they contradict each other. Set use_dora "
            f"to true in it if the adapter was trained with DoRA; if not, the tensors are another adapter's"
        )
        return FormatError(told, file=path, tensor=key)
    return UnsupportedError("is neither a lora_A nor a lora_B and can't be expressed", file=path, tensor=key)
