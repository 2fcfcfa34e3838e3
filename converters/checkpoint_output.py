"""Writing a checkpoint again with some of its tensors changed: a safetensors directory like the one it came from.

Shards, their order of tensors and the index stay as they are; what is not changed is copied byte for byte, also what
nobody here can interpret. Tensors stream through in row ranges of a few megabytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from converters.atomic import atomic_directory
from converters.checkpoint import INDEX, MAX_INDEX, Checkpoint
from converters.checkpoint_files import CARD
from converters.checkpoint_plan import CONFIG, CheckpointPlan, Shard, plan_checkpoint
from converters.errors import FileMissingError, UnsupportedError, system_reason
from converters.paths import is_there, read_bytes
from converters.safetensors_file import write_safetensors
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

Rows = Callable[[int, int], "torch.Tensor"]
"""Gives rows [start, stop) of a tensor seen as a matrix, all dimensions but the last merged: floats, any device."""
Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, next tensor)."""

_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_STEP = 1 << 20  # elements that are asked for at a time
_SERIAL = 1 << 15  # elements, so few that torch takes one thread: on a busy machine several wait long for each other
_CONFIG_TYPE = re.compile(rb'((?<!\\)"(?:torch_)?dtype"\s*:\s*)"(torch\.)?(?:b?float16|float32|float64)"')
_TOTAL_SIZE = re.compile(rb'("total_size"\s*:\s*)[-+.\deE]+')


def write_checkpoint(
    source: Checkpoint,
    target: Path,
    changes: Mapping[str, Rows],
    *,
    outtype: str | None,
    card: str,
    metadata: Mapping[str, str],
    force: bool,
    progress: Progress | None = None,
) -> Mapping[str, float]:
    """Writes the directory, whole or not at all: tensor files, index, config.json, the card as README.md, and what
    stands beside the source (see `companions_of`: its own README.md becomes README.original.md).

    A source that is a single file becomes model.safetensors, the name under which a model is looked for.

    Args:
        changes: new values of some tensors; asked for in order, a few megabytes at a time, and rounded to nearest
            even from float32.
        outtype: see `plan_checkpoint`; config.json then names it as well.
        metadata: strings added to those that each tensor file has in its header.

    Returns:
        ||stored - value|| / ||value|| (Frobenius) of every tensor that was stored again, by name.

    Raises:
        UsageError, UnsupportedError: see `plan_checkpoint`; UnsupportedError also for values that are not finite or
            don't fit their type.
        OutputPathError, WriteError: see `converters.atomic`.
    """
    plan = plan_checkpoint(source, changes, outtype=outtype)
    data = _TensorData(plan, changes, progress)
    with atomic_directory(target, force=force) as directory:
        for shard in plan.shards:
            with (directory / shard.name).open("wb") as file:
                strings = {"format": "pt", **shard.file.header.metadata, **metadata}
                write_safetensors(file, list(shard.infos.values()), partial(data.pieces, shard), strings)
        for name, text in _descriptions(plan).items():
            (directory / name).write_bytes(text)
        for name, companion in plan.companions.copied.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            with (directory / name).open("wb") as copy:
                copy.writelines(_pieces_of(companion))
        (directory / CARD).write_text(card, encoding="utf-8", newline="\n")
    return data.errors


class _TensorData:
    """Gives every tensor's bytes in the output piece by piece; counts them, and keeps what rounding cost."""

    def __init__(self, plan: CheckpointPlan, changes: Mapping[str, Rows], progress: Progress | None) -> None:
        self.errors: dict[str, float] = {}
        self._changes, self._progress = changes, progress
        self._done, self._total = 0, plan.tensor_bytes

    def pieces(self, shard: Shard, name: str) -> Iterator[memoryview]:
        self._tell(name)
        for piece in self._of(shard, name):
            yield piece
            self._done += len(piece)
            self._tell(name)

    def _tell(self, name: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, name)

    def _of(self, shard: Shard, name: str) -> Iterator[memoryview]:
        file, info = shard.file, shard.infos[name]
        if name in shard.changed:
            return _rounded(info, self._changes[name], self.errors, file.path, finite=True)
        if info.dtype != file.infos[name].dtype:
            return _rounded(info, partial(file.rows, name), self.errors, file.path, finite=False)
        return file.stored(name)


def _rounded(
    info: TensorInfo, rows: Rows, errors: dict[str, float], file: Path, *, finite: bool
) -> Iterator[memoryview]:
    """The tensor's bytes in the type of `info`; its relative rounding error goes to `errors` at the end."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH[info.dtype])
    columns = info.shape[-1] if info.shape else 1
    height = info.elements // columns if columns else 0
    step = max(1, _STEP // max(1, columns))
    lost = size = 0.0
    for start in range(0, height, step):
        stop = min(start + step, height)
        values = rows(start, stop).detach().cpu()
        assert values.shape == (stop - start, columns), f"{info.name}: {tuple(values.shape)}, {stop - start} rows asked"
        stored, lost_here, size_here = _round(values, dtype)
        if not math.isfinite(lost_here + size_here):
            sound = _check_range(values, stored, info, file, finite=finite)
            _, lost_here, size_here = _round(values[sound], dtype)
        lost, size = lost + lost_here, size + size_here
        yield stored.view(torch.uint8).numpy().data
    errors[info.name] = math.sqrt(lost / size) if size else 0.0


def _round(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float, float]:
    """Values in another type, in one dimension; the squared norms of the error and of the values."""
    import torch

    flat = values.reshape(-1)
    stored = torch.empty(flat.shape, dtype=dtype)
    lost = size = 0.0
    for start in range(0, flat.numel(), _SERIAL):
        part, target = flat[start : start + _SERIAL], stored[start : start + _SERIAL]
        exact = part if part.dtype == torch.float64 else part.float()
        target.copy_(exact)
        size += float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2
        if dtype != exact.dtype:
            lost += float(torch.linalg.vector_norm(target.to(exact.dtype).sub_(exact), dtype=torch.float64)) ** 2
    return stored, lost, size


def _check_range(
    values: torch.Tensor, stored: torch.Tensor, info: TensorInfo, file: Path, *, finite: bool
) -> torch.Tensor:
    """Which values are finite, in the shape of `values`.

    Raises:
        UnsupportedError: rounding made one infinite; or all must be `finite` and one is not.
    """
    sound = values.isfinite()
    if finite and not sound.all():
        raise UnsupportedError("would hold values that are not finite", file=file, tensor=info.name)
    if (sound & ~stored.isfinite().reshape(sound.shape)).any():
        largest = float(values[sound].abs().max())
        raise UnsupportedError(
            f"holds the value {largest:.6g}, which does not fit the type {info.dtype}; choose another with --outtype",
            file=file,
            tensor=info.name,
        )
    return sound


def _descriptions(plan: CheckpointPlan) -> dict[str, bytes]:
    """config.json and the index where there is one: the source's bytes, the type and the size in them made true."""
    source = plan.source
    config = read_bytes(source.config_file, "the model's config.json")
    files = {CONFIG: config}
    if source.path.is_dir() and is_there(source.path / INDEX):
        files[INDEX] = read_bytes(source.path / INDEX, "the index", MAX_INDEX)
    if plan.dtype is not None:
        name = _TORCH[plan.dtype].encode()
        files[CONFIG] = _CONFIG_TYPE.sub(rb'\g<1>"\g<2>' + name + b'"', config)
        if INDEX in files:
            files[INDEX] = _TOTAL_SIZE.sub(rb"\g<1>%d" % plan.tensor_bytes, files[INDEX])
    return files


def _pieces_of(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_STEP):
                yield piece
    except OSError as error:
        raise FileMissingError(f"can't be read: {system_reason(error)}", file=path) from None
