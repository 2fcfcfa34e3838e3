"""Writing a checkpoint again with some of its tensors changed: a safetensors directory like the one it came from.

Shards, their order of tensors and the index stay as they are; what is not changed is copied byte for byte, also what
nobody here can interpret. Tensors stream through in row ranges of a few megabytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from converters.ahead import ahead, in_mode
from converters.atomic import atomic_directory
from converters.changes import Edits, Rows
from converters.checkpoint import INDEX, MAX_INDEX, Checkpoint
from converters.checkpoint_files import CARD
from converters.checkpoint_plan import CONFIG, CheckpointPlan, Shard, plan_checkpoint
from converters.edited_config import config_bytes
from converters.errors import FileMissingError, UnsupportedError, system_reason
from converters.fingerprint import hashed_behind
from converters.gguf_rounding import StoredError
from converters.paths import is_there, parse_json_object, read_bytes
from converters.safetensors_file import write_safetensors
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, next tensor)."""

_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_STEP = 1 << 20  # elements that are asked for at a time
_DEPTH = 4  # pieces that are made ahead
_TOTAL_SIZE = re.compile(rb'("total_size"\s*:\s*)[-+.\deE]+')


def write_checkpoint(
    source: Checkpoint,
    target: Path,
    edits: Edits,
    *,
    outtype: str | None,
    card: str | None,
    metadata: Mapping[str, str],
    force: bool,
    progress: Progress | None = None,
) -> Mapping[str, StoredError]:
    """Writes the directory, whole or not at all: tensor files, index, config.json, the card as README.md, and what
    stands beside the source (see `companions_of`: its own README.md becomes README.original.md).

    A source that is a single file becomes model.safetensors, the name under which a model is looked for.

    Args:
        edits: new values are asked for in order, a few megabytes at a time, on whatever device, and rounded to nearest
            even from float32.
        outtype: see `plan_checkpoint`; config.json then names it as well.
        card: None: the copy has none.
        metadata: strings added to those that each tensor file has in its header.

    Returns:
        What rounding cost every tensor that was stored again, by name.

    Raises:
        UsageError, UnsupportedError: see `plan_checkpoint`; UnsupportedError also for values that are not finite or
            don't fit their type.
        OutputPathError, WriteError: see `converters.atomic`.
    """
    plan = plan_checkpoint(source, edits, outtype=outtype)
    data = _TensorData(plan, progress)
    with atomic_directory(target, force=force) as directory:
        for shard in plan.shards:
            with (directory / shard.name).open("wb") as file:
                strings = {"format": "pt", **shard.file.header.metadata, **metadata}
                data.write(file, shard, strings, hashed=shard is plan.shards[0])
        for name, text in _descriptions(plan).items():
            (directory / name).write_bytes(text)
        for name, companion in plan.companions.copied.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            with (directory / name).open("wb") as copy:
                copy.writelines(_pieces_of(companion))
        if card is not None:
            (directory / CARD).write_text(card, encoding="utf-8", newline="\n")
    return data.errors


class _TensorData:
    """Gives every tensor's bytes in the output piece by piece; counts them, and keeps what rounding cost."""

    def __init__(self, plan: CheckpointPlan, progress: Progress | None) -> None:
        self.errors: dict[str, StoredError] = {}
        self._changes, self._progress = plan.edits.changes, progress
        self._done, self._total = 0, plan.tensor_bytes

    def write(self, file: BinaryIO, shard: Shard, strings: Mapping[str, str], *, hashed: bool) -> None:
        """Writes a shard; what comes next is computed meanwhile in a thread."""
        infos = list(shard.infos.values())
        size = sum(info.nbytes for info in infos) if hashed else 0
        with (
            hashed_behind(file, size) as written,
            contextlib.closing(ahead(self._all(shard), _DEPTH, in_mode())) as stream,
        ):

            def pieces(name: str) -> Iterator[memoryview]:
                left = shard.infos[name].nbytes
                self._tell(name)
                while left:
                    piece = next(stream)
                    yield piece
                    written(file.tell())
                    left, self._done = left - len(piece), self._done + len(piece)
                    self._tell(name)

            write_safetensors(file, infos, pieces, strings)
            assert next(stream, None) is None, "more pieces than were announced"

    def _all(self, shard: Shard) -> Iterator[memoryview]:
        for name in shard.infos:
            yield from self._of(shard, name)

    def _tell(self, name: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, name)

    def _of(self, shard: Shard, name: str) -> Iterator[memoryview]:
        file, info = shard.file, shard.infos[name]
        if name in shard.changed:
            return _rounded(info, self._changes[name].rows, self.errors, file.path, finite=True)
        if info.dtype != file.infos[name].dtype:
            return _rounded(info, partial(file.rows, name), self.errors, file.path, finite=False)
        return (memoryview(bytes(piece)) for piece in file.stored(name))  # which come in the same memory


def _rounded(
    info: TensorInfo, rows: Rows, errors: dict[str, StoredError], file: Path, *, finite: bool
) -> Iterator[memoryview]:
    """The tensor's bytes in the type of `info`; its rounding error goes to `errors` at the end."""
    import torch

    from converters.in_cache import rounded

    dtype: torch.dtype = getattr(torch, _TORCH[info.dtype])
    columns = info.shape[-1] if info.shape else 1
    height = info.elements // columns if columns else 0
    step = max(1, _STEP // max(1, columns))
    lost = size = 0.0
    for start in range(0, height, step):
        stop = min(start + step, height)
        values = rows(start, stop).detach().cpu()
        assert values.shape == (stop - start, columns), f"{info.name}: {tuple(values.shape)}, {stop - start} rows asked"
        stored = torch.empty(values.shape, dtype=dtype)
        lost_here, size_here = rounded(values, stored)
        if not math.isfinite(lost_here + size_here):
            sound = _check_range(values, stored, info, file, finite=finite)
            lost_here, size_here = rounded(values[sound].reshape(-1, 1), stored[sound].reshape(-1, 1))
        lost, size = lost + lost_here, size + size_here
        yield stored.reshape(-1).view(torch.uint8).numpy().data
    errors[info.name] = StoredError(math.sqrt(lost / size) if size else 0.0, math.sqrt(lost))


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
    if (sound & ~stored.isfinite()).any():
        largest = float(values[sound].abs().max())
        raise UnsupportedError(
            f"holds the value {largest:.6g}, which does not fit the type {info.dtype}; choose another with --outtype",
            file=file,
            tensor=info.name,
        )
    return sound


def _descriptions(plan: CheckpointPlan) -> dict[str, bytes]:
    """config.json and the index where there is one: the source's bytes, and in them made true what has changed."""
    source, dtype = plan.source, None if plan.dtype is None else _TORCH[plan.dtype]
    config = read_bytes(source.config_file, "the model's config.json")
    files = {CONFIG: config_bytes(config, source.config_file, plan.edits.config, dtype)}
    if source.path.is_dir() and is_there(source.path / INDEX):
        index = read_bytes(source.path / INDEX, "the index", MAX_INDEX)
        if plan.added:
            index = _with_tensors(index, plan.added, source.path / INDEX)
        if plan.tensor_bytes != sum(info.nbytes for file in source.files for info in file.infos.values()):
            index = _TOTAL_SIZE.sub(rb"\g<1>%d" % plan.tensor_bytes, index)
        files[INDEX] = index
    return files


def _with_tensors(index: bytes, added: Mapping[str, str], file: Path) -> bytes:
    """An index that knows further tensors and their shards."""
    table = parse_json_object(index, "the index", file)
    table["weight_map"] = {**table["weight_map"], **added}
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def _pieces_of(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_STEP):
                yield piece
    except OSError as error:
        raise FileMissingError(f"can't be read: {system_reason(error)}", file=path) from None
