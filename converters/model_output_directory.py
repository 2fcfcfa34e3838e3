"""A checkpoint written again as a safetensors directory like the one it came from (a `ModelOutput`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from converters.changes import Edits
from converters.checkpoint import Checkpoint
from converters.checkpoint_output import write_checkpoint
from converters.checkpoint_plan import check_model_directory, plan_checkpoint
from converters.errors import UsageError
from converters.free_space import free_space_for
from converters.gguf_rounding import StoredError
from converters.model_card import Fact, fact_text
from converters.model_request import KEEP, ModelRequest, PlannedTensor, Progress
from converters.names import first_few


class DirectoryOutput:
    """Shards, index and everything beside them as in the source.

    Raises:
        UsageError: options that are for GGUF. See also `plan_checkpoint` and `check_model_directory`.
    """

    losses: tuple[str, ...] = ()
    quantizes = False

    def __init__(self, source: Checkpoint, edits: Edits, request: ModelRequest, inputs: Sequence[Path]) -> None:
        _refuse_options(request)
        self.target, self._request, self._edits = request.out, request, edits
        self._outtype = None if request.keeps else str(request.outtype)
        self._plan = plan_checkpoint(source, edits, outtype=self._outtype)
        reads = (*inputs, *((edits.tokenizer,) if edits.tokenizer else ()))
        check_model_directory(self._plan, request.out, reads, force=request.force)

    @property
    def outtype(self) -> str:
        return KEEP if self._outtype is None else str(self._request.outtype)

    @property
    def files(self) -> Sequence[Path]:
        return tuple(self.target / shard.name for shard in self._plan.shards)

    @property
    def tensor_file(self) -> Path:
        return self.files[0]

    @property
    def tensors(self) -> Sequence[PlannedTensor]:
        return tuple(
            PlannedTensor(
                name, info.shape, info.dtype, shard.file.infos[name].dtype if name in shard.file.infos else None
            )
            for shard in self._plan.shards
            for name, info in shard.infos.items()
        )

    @property
    def notes(self) -> tuple[str, ...]:
        left = self._plan.left_out
        return (f"left behind, since it is no part of this form of the model: {first_few(left)}",) if left else ()

    def planned_bytes(self) -> int:
        return self._plan.nbytes

    def write(
        self, facts: Mapping[str, Fact], *, card: str | None = None, progress: Progress | None = None
    ) -> Mapping[str, StoredError]:
        """See `ModelOutput.write`."""
        free_space_for(self.target, self._plan.nbytes)
        metadata = {key: fact_text(value) for key, value in facts.items()}
        return write_checkpoint(self._plan.source, self.target, self._edits, outtype=self._outtype, card=card,
                                metadata=metadata, force=self._request.force, progress=progress)  # fmt: skip


def _refuse_options(request: ModelRequest) -> None:
    given = {
        "--imatrix": request.imatrix,
        "--vocab-from": request.vocab_from,
        "--split-max-size": request.split_max_size,
    }
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UsageError(f"{', '.join(names)}: for GGUF alone, and --out is a directory; let it end in .gguf")
