"""What a checkpoint that is written again will hold, and whether it may be written there; from headers alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.atomic import check_target, entries_to_replace, refuse_to_discard, refuse_to_swallow
from converters.checkpoint import INDEX, Checkpoint
from converters.checkpoint_files import Companions, companions_of, is_weights
from converters.errors import OutputPathError, UnsupportedError, UsageError
from converters.paths import resolved
from converters.safetensors_file import SafetensorsFile
from converters.tensors import TensorInfo

CONFIG = "config.json"
OUTTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""What `--outtype` calls the types of a safetensors model."""

_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_INTEGERS = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


@dataclass(frozen=True)
class Shard:
    """One tensor file.

    Attributes:
        name: what it is called in the output.
        infos: its tensors in their order, as they will be stored.
        changed: those of them that get new values.
    """

    file: SafetensorsFile
    name: str
    infos: Mapping[str, TensorInfo]
    changed: frozenset[str]


@dataclass(frozen=True)
class CheckpointPlan:
    """What a rewritten checkpoint will hold, from headers alone.

    Attributes:
        dtype: what all its floating tensors become; None where each keeps its own.
    """

    source: Checkpoint
    shards: tuple[Shard, ...]
    companions: Companions
    dtype: str | None

    @property
    def tensor_bytes(self) -> int:
        return sum(info.nbytes for shard in self.shards for info in shard.infos.values())

    @property
    def nbytes(self) -> int:
        """The size of the output, but for the tensor files' headers, the configuration and the card."""
        return self.tensor_bytes + self.companions.nbytes

    @property
    def left_out(self) -> tuple[str, ...]:
        """Files and subdirectories of the source that stay behind, for a note."""
        return self.companions.left_out


def plan_checkpoint(source: Checkpoint, changed: Collection[str], *, outtype: str | None = None) -> CheckpointPlan:
    """Checks that a checkpoint can be written again with these tensors changed.

    Args:
        changed: names of tensors of the source.
        outtype: f32, f16 or bf16 for all floating tensors; None: each keeps its type.

    Raises:
        UsageError: an unknown type.
        UnsupportedError: a changed tensor is not stored as plain floats; or with an outtype, the model is quantized.
        FileMissingError: the source's directory can't be looked into.
    """
    if outtype is not None and outtype not in OUTTYPES:
        raise UsageError(f"unknown outtype {outtype!r}; a safetensors model can be {', '.join(OUTTYPES)}")
    for name in changed:
        source.check_type(name)
    dtype = None if outtype is None else OUTTYPES[outtype]
    if dtype is not None:
        _refuse_quantized(source)
    shards = tuple(_shard(source, file, changed, dtype) for file in source.files)
    return CheckpointPlan(source, shards, companions_of(source), dtype)


def check_model_directory(plan: CheckpointPlan, target: Path, inputs: Sequence[Path] = (), *, force: bool) -> None:
    """Whether a rewritten checkpoint may be written there; to be called before any work is done.

    Args:
        inputs: further files and directories that the run reads; the plan's source is one in any case.

    Raises:
        OutputPathError: the target is, holds or lies in something that is read; or it exists, without `force`, or
            with things in it that are no part of a model.
    """
    check_target(target, force=force, directory=True)
    reads, place = (plan.source.path, *plan.source.sources, *inputs), resolved(target)
    refuse_to_swallow(target, reads)
    for path in reads:
        if path.is_dir() and place.is_relative_to(resolved(path)):
            raise OutputPathError(f"lies in {path}, which is read; choose a place outside", file=target)
    _refuse_to_discard(plan, target)


def _shard(source: Checkpoint, file: SafetensorsFile, changed: Collection[str], dtype: str | None) -> Shard:
    infos = {name: _retyped(info, dtype) for name, info in file.infos.items()}
    # A second tensor of the name, in a shard that the index doesn't give it to, stays what it is.
    ours = frozenset(name for name in infos if name in changed and source.file_of(name) == file.path)
    return Shard(file, file.path.name if source.path.is_dir() else "model.safetensors", infos, ours)


def _retyped(info: TensorInfo, dtype: str | None) -> TensorInfo:
    if dtype is None or info.dtype not in _ITEM:
        return info
    return replace(info, dtype=dtype, nbytes=info.elements * _ITEM[dtype])


def _refuse_quantized(source: Checkpoint) -> None:
    """Another type for the scales of packed weights would be no other type of the model."""
    if source.config.get("quantization_config"):
        raise UnsupportedError(
            "has a quantization_config, and --outtype is for models of plain floats; leave it out, or dequantize the "
            "model first",
            file=source.config_file,
        )
    for file in source.files:
        for name, info in file.infos.items():
            if info.dtype not in _INTEGERS:
                file.check_type(name)


def _refuse_to_discard(plan: CheckpointPlan, target: Path) -> None:
    """--force swaps a directory whole, so it must be a model and nothing more: no one's letters, checkpoints or
    quantizations."""
    others, what = entries_to_replace(target), "holds no model"
    if any(entry.name == CONFIG for entry in others):
        known = {INDEX, *(shard.name for shard in plan.shards), *(Path(own).parts[0] for own in plan.companions.copied)}
        others = [entry for entry in others if entry.name not in known and _is_precious(entry)]
        what = "holds more than a model"
    refuse_to_discard(target, others, what)


def _is_precious(entry: Path) -> bool:
    return entry.is_dir() or (is_weights(entry.name) and not entry.match("model*.safetensors"))
