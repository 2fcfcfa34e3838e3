"""What a checkpoint that is written again will hold, and whether it may be written there; from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from converters.atomic import check_target, entries_to_replace, refuse_to_discard, refuse_to_swallow
from converters.changes import Change, Edits
from converters.checkpoint import INDEX, Checkpoint
from converters.checkpoint_files import Companions, companions_of, is_weights, with_tokenizer
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
        infos: its tensors in their order, as they will be stored, those that are new included.
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
        edits: in what it differs from the source.
        dtype: what all its floating tensors become; None where each keeps its own.
    """

    source: Checkpoint
    edits: Edits
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

    @property
    def added(self) -> Mapping[str, str]:
        """The tensors that the source has not, and the file that each is in."""
        return {name: shard.name for shard in self.shards for name in shard.changed if name not in shard.file.infos}


def plan_checkpoint(source: Checkpoint, edits: Edits | None = None, *, outtype: str | None = None) -> CheckpointPlan:
    """Checks that a checkpoint can be written again with these edits.

    Args:
        outtype: f32, f16 or bf16 for all floating tensors; None: each keeps its type.

    Raises:
        UsageError: an unknown type.
        UnsupportedError: a changed tensor is not stored as plain floats; or with an outtype, the model is quantized.
        FileMissingError: the source's directory, or the new tokenizer's, can't be looked into.
    """
    edits = edits or Edits()
    if outtype is not None and outtype not in OUTTYPES:
        raise UsageError(f"unknown outtype {outtype!r}; a safetensors model can be {', '.join(OUTTYPES)}")
    for name, change in edits.changes.items():
        source.check_type(name if name in source.infos else _origin(source, change, edits))
    dtype = None if outtype is None else OUTTYPES[outtype]
    if dtype is not None:
        _refuse_quantized(source)
    shards = tuple(_shard(source, file, edits, dtype) for file in source.files)
    companions = companions_of(source)
    if edits.tokenizer is not None:
        companions = with_tokenizer(companions, edits.tokenizer)
    return CheckpointPlan(source, edits, shards, companions, dtype)


def _origin(source: Checkpoint, change: Change, edits: Edits) -> str:
    """The source's tensor that a new one follows, maybe after others."""
    name = change.after
    while name is not None and name not in source.infos:
        name = edits.changes[name].after
    assert name is not None, f"the model has no {change.name}, and nothing says after what it comes"
    return name


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


def _shard(source: Checkpoint, file: SafetensorsFile, edits: Edits, dtype: str | None) -> Shard:
    infos: dict[str, TensorInfo] = {}
    changed = set()
    for name, info in file.infos.items():
        # A second tensor of the name, in a shard that the index doesn't give it to, stays what it is.
        ours = name in source.infos and source.file_of(name) == file.path
        change = edits.changes.get(name) if ours else None
        infos[name] = _retyped(info if change is None else _as_changed(info, change), dtype)
        changed |= {name} if change else set()
        for new in _following(name, edits, source) if ours else ():
            infos[new.name] = _retyped(_as_changed(replace(info, name=new.name), new), dtype)
            changed.add(new.name)
    name = file.path.name if source.path.is_dir() else "model.safetensors"
    return Shard(file, name, infos, frozenset(changed))


def _following(name: str, edits: Edits, source: Checkpoint) -> Iterator[Change]:
    """The new tensors that come after one, and those that come after these."""
    for change in edits.changes.values():
        if change.after == name and change.name not in source.infos:
            yield change
            yield from _following(change.name, edits, source)


def _as_changed(info: TensorInfo, change: Change) -> TensorInfo:
    shape = info.shape if change.shape is None else change.shape
    return replace(info, shape=shape, nbytes=prod(shape) * _ITEM[info.dtype])


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
