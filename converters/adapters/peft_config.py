"""adapter_config.json: what a PEFT adapter's tensors mean, and which adapters are more than pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.adapters.patterns import check_patterns, first_matches
from converters.errors import FormatError, UnsupportedError

_HARMLESS_INITS = {None, True, False, "gaussian", "eva", "orthogonal"}
"""Initialisations that leave the base model as it is; the others subtract something from it."""

_REFUSED_SWITCHES = {
    "use_dora": "uses DoRA, whose update has no low rank: convert adapter makes the nearest pairs, or merge it "
    "(safelora-gguf merge)",
    "use_qalora": "uses QALoRA, which pools its inputs",
    "layer_replication": "repeats layers of its base model (layer_replication)",
    "kasa_config": "is a KaSA adapter, which changes its base model",
    "monteclora_config": "is a Monteclora adapter, whose weights are random variables",
    "use_bdlora": "is a BD-LoRA adapter, whose matrices are block-diagonal",
    "arrow_config": "is an Arrow router over several adapters",
}

_MOST_NAMES = 10_000
_LONGEST_NAME = 1000
_MOST_TABLES = 100
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class Meaning:
    """What the configuration says about one module: delta = scaling * B @ A.

    Attributes:
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    rank: int
    scaling: float


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that decides what the pairs mean, and what else was trained.

    Attributes:
        peft_version: of the PEFT that wrote it, 0.21.2 as (0, 21, 2); before 0.18 it said nothing: ().
        target_parameters: bare parameters that have pairs: names, or their ends behind a dot.
        modules_to_save: modules that were trained whole: names, or their ends.
        trained_tokens: single tokens that were trained (trainable_token_indices), by the end of their table's name;
            those of any table by no name.
        lora_bias: whether every lora_B was trained with a bias.
        bias: which of the base's biases were trained: none, all or lora_only.
        fan_in_fan_out: whether weights that PEFT can't tell by their class are stored as (in, out). It sets this aside
            for every nn.Linear, but not for GPT-2's Conv1D.
    """

    path: Path
    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    base_model_name: str | None
    peft_version: tuple[int, ...]
    invocation_tokens: tuple[int, ...]
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    trained_tokens: Mapping[str, tuple[int, ...]]
    lora_bias: bool
    bias: str
    fan_in_fan_out: bool

    def meanings(self, modules: Sequence[str]) -> dict[str, Meaning]:
        """Rank and scaling by module, by the names that PEFT matches its patterns against: those of the adapter's
        own tensors, and the parameter's behind them where that is what has the pair.

        Raises:
            FormatError: a pattern backtracks without end.
        """
        if not self.rank_pattern and not self.alpha_pattern:
            return dict.fromkeys(modules, self._meaning(self.r, self.lora_alpha))
        ranks = first_matches(list(self.rank_pattern), modules, self.path)
        alphas = first_matches(list(self.alpha_pattern), modules, self.path)
        meanings = {}
        for module in modules:
            rank = int(self.rank_pattern[ranks[module]]) if module in ranks else self.r
            alpha = self.alpha_pattern[alphas[module]] if module in alphas else self.lora_alpha
            meanings[module] = self._meaning(rank, alpha)
        return meanings

    def _meaning(self, rank: int, alpha: float) -> Meaning:
        return Meaning(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))


def parse_peft_config(raw: Mapping[str, Any], path: Path, *, dora: bool = False) -> PeftConfig:
    """Checks a parsed adapter_config.json.

    Args:
        dora: accept DoRA, whose magnitudes the caller knows how to use.

    Raises:
        FormatError: a value has the wrong type or is out of range.
        UnsupportedError: the adapter's pairs are not what plain LoRA pairs are. Whatever was trained beside them is
            no reason.
    """
    _refuse_other_pairs({**raw, "use_dora": False} if dora else raw, path)
    alpha = _number(raw, "lora_alpha", 8, path)
    name = raw.get("base_model_name_or_path")
    return PeftConfig(
        path=path,
        r=_rank(raw, path),
        lora_alpha=alpha,
        use_rslora=_flag(raw, "use_rslora", path),
        use_dora=_flag(raw, "use_dora", path),
        rank_pattern=_patterns(raw, "rank_pattern", path),
        alpha_pattern=_patterns(raw, "alpha_pattern", path),
        peft_version=_version(raw.get("peft_version")),
        base_model_name=name if isinstance(name, str) and name else None,
        invocation_tokens=_tokens(raw.get("alora_invocation_tokens"), path),
        target_parameters=_names(raw, "target_parameters", path),
        modules_to_save=_names(raw, "modules_to_save", path),
        trained_tokens=_trained_tokens(raw.get("trainable_token_indices"), path),
        lora_bias=_flag(raw, "lora_bias", path),
        bias=_bias(raw, path),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out", path),
    )


def _refuse_other_pairs(raw: Mapping[str, Any], path: Path) -> None:
    kind = raw.get("peft_type")
    if kind is None and "lora_parameters" in raw:
        raise UnsupportedError(
            "is an MLX adapter's configuration, and there is no adapters.safetensors beside it; copy the numbered "
            "checkpoint that you want to that name",
            file=path,
        )
    if kind != "LORA":
        raise UnsupportedError(f"peft_type is {_shown(kind)}; only LORA adapters can be read", file=path)
    for switch, what in _REFUSED_SWITCHES.items():
        if raw.get(switch):
            raise UnsupportedError(what, file=path)
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, str | bool | None) or init not in _HARMLESS_INITS:
        raise UnsupportedError(
            f"was initialised with {_shown(init)}, which changes the base model, so that it fits no published one; "
            f"save it converted (PEFT: path_initial_model_for_weight_conversion) and try again",
            file=path,
        )


def _rank(raw: Mapping[str, Any], path: Path) -> int:
    rank = raw.get("r", 8)
    if type(rank) not in (int, float) or not 0 < rank < 1 << 20 or rank != int(rank):
        raise FormatError(f"r is {_shown(rank)}, expected a positive whole number", file=path)
    return int(rank)


def _number(raw: Mapping[str, Any], key: str, default: float, path: Path) -> float:
    value = raw.get(key, default)
    if type(value) not in (int, float) or not abs(value) <= 1e30:  # NaN compares false
        raise FormatError(f"{key[:80]} is {_shown(value)}, expected a number", file=path)
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, path: Path) -> bool:
    value = raw.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise FormatError(f"{key} is {_shown(value)}, expected true or false", file=path)
    return value


def _patterns(raw: Mapping[str, Any], key: str, path: Path) -> dict[str, float]:
    table = raw.get(key)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise FormatError(f"{key} is no object of patterns", file=path)
    check_patterns(table, key, path)
    values = {pattern: _number(table, pattern, 0, path) for pattern in table}
    if key == "rank_pattern" and not all(value >= 1 and value == int(value) for value in values.values()):
        raise FormatError(f"{key} gives a rank that is no positive whole number", file=path)
    return values


def _names(raw: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = raw.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise FormatError(f"{key} is {_shown(names)}, expected a list of names", file=path)
    longest = max(map(len, names), default=0)
    if longest > _LONGEST_NAME or len(names) > _MOST_NAMES:
        found = f"{key} has {len(names)} names of up to {longest} characters"
        raise FormatError(f"{found}; at most {_MOST_NAMES} of {_LONGEST_NAME} are read", file=path)
    return tuple(names)


def _bias(raw: Mapping[str, Any], path: Path) -> str:
    bias = raw.get("bias")
    if bias is None:
        return "none"
    if bias not in _BIASES:
        raise FormatError(f"bias is {_shown(bias)}, expected one of {', '.join(_BIASES)}", file=path)
    return str(bias)


def _tokens(value: Any, path: Path) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in value):
        raise FormatError("alora_invocation_tokens is no list of tokens", file=path)
    return tuple(value)


def _trained_tokens(value: Any, path: Path) -> dict[str, tuple[int, ...]]:
    """A list is for the input's embedding, and for a head that is tied to it."""
    tables = {"": value} if isinstance(value, list) else value or {}
    if not isinstance(tables, dict):
        told = f"trainable_token_indices is {_shown(value)}, expected a list of tokens or one for every table"
        raise FormatError(told, file=path)
    if len(tables) > _MOST_TABLES:
        told = f"trainable_token_indices names {len(tables)} tables, more than any model has"
        raise FormatError(told, file=path)
    return {name: _indices(tokens, path) for name, tokens in tables.items() if tokens}


def _indices(value: Any, path: Path) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in value):
        raise FormatError(f"trainable_token_indices has {_shown(value)}, expected a list of tokens", file=path)
    if len(set(value)) != len(value):
        raise FormatError("trainable_token_indices has a token twice", file=path)
    return tuple(value)


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _version(value: Any) -> tuple[int, ...]:
    """The leading numbers of "0.18.2.dev0@fb8c"."""
    found = re.match(r"\d{1,4}(?:\.\d{1,4})*", value) if isinstance(value, str) else None
    return tuple(int(part) for part in found[0].split(".")) if found else ()
