"""Models to GGUF: a safetensors checkpoint, or a GGUF model in another type, with another vocabulary or in shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from converters.changes import Edits
from converters.errors import InputError, UnsupportedError, UsageError
from converters.fingerprint import fingerprint_gguf
from converters.gguf_rounding import StoredError
from converters.identity import plain_name
from converters.model_card import Fact
from converters.model_output import ModelOutput, ModelRequest, plan_model_output
from converters.models import Model
from converters.opening import open_adapter, open_model
from converters.paths import is_there
from converters.quantization import file_type
from safelora_gguf._version import __version__
from safelora_gguf.cards import check_desktop_files, write_desktop_files
from safelora_gguf.device import exact_float32
from safelora_gguf.model_conversion_report import ConvertedTensor, ConvertModelReport
from safelora_gguf.report import InputReport, OutputReport
from safelora_gguf.unwritten import Unwritten

Progress = Callable[[int, int, str], None]


def convert_model(
    source: str | Path | Unwritten,
    out: str | Path,
    *,
    outtype: str | None = None,
    vocab_from: str | Path | None = None,
    imatrix: str | Path | None = None,
    split_max_size: int | None = None,
    allow_requantize: bool = False,
    card: bool = False,
    force: bool = False,
    dry_run: bool = False,
    invocation: str = "",
    progress: Progress | None = None,
) -> ConvertModelReport:
    """Converts a model to GGUF, with the tensors, keys and vocabulary that llama.cpp's own converter gives it.

    Args:
        source: a model directory, a .safetensors file with config.json beside it, a GGUF model, or what `merged_model`
            or `extrapolated_model` gave.
        out: a file ending in .gguf.
        outtype: f32, f16, bf16, q8_0, or any of llama.cpp's quantizations, made by its own quantizer; by default every
            matrix keeps its type.
        vocab_from: a GGUF model whose vocabulary and chat template are taken as they are.
        imatrix: an importance matrix in GGUF, which the smallest types need.
        split_max_size: bytes that a file may have; a larger model becomes shards.
        allow_requantize: quantize what is quantized already.
        card: write a model card and a Modelfile beside the output.
        force: replace an existing output.
        dry_run: check all headers and the vocabulary, write nothing.
        invocation: the command line, for the card.
        progress: called with (bytes done, bytes in all, next tensor).

    Raises:
        UsageError: options that make no sense.
        InputError: a file or an output path that cannot be used; nothing was written.
        LlamaError: llama.cpp's quantizer failed.
        WriteError: the disk is full or fails; nothing partial was left.
    """
    request = ModelRequest(Path(out), outtype, _path(imatrix), _path(vocab_from), split_max_size, allow_requantize,
                           force=force)  # fmt: skip
    _check(request)
    before = source if isinstance(source, Unwritten) else None
    model = _opened(source) if isinstance(source, str | Path) else source.model
    own = (InputReport.of("model", model),) if before is None else before.inputs
    places = [Path(entry.path) for entry in own]
    inputs = (*own, *_beside(request))
    if card:
        check_desktop_files(request.out, force=force, inputs=places)
    output = plan_model_output(model, Edits(), request, places)
    facts = _facts(own[0]) if before is None else before.facts
    with exact_float32():
        errors = None if dry_run else output.write(facts, progress=progress)
    report = _report(output, inputs, errors, before)
    if card and not dry_run:
        write_desktop_files(output.tensor_file, report.to_json(), places, None, invocation, force=force)
    return report


def _check(request: ModelRequest) -> None:
    """Raises UsageError: options that are wrong whatever the source."""
    if not request.is_gguf:
        raise UsageError(f"models are converted to GGUF: --out must end in .gguf, and is {request.out.name}")
    if request.split_max_size is not None and request.split_max_size <= 0:
        raise UsageError(f"split_max_size is {request.split_max_size}, expected a number of bytes")
    if not request.keeps:
        file_type(str(request.outtype))


def _opened(source: str | Path) -> Model:
    """Raises UnsupportedError: an adapter. See also `open_model`."""
    try:
        return open_model(source)
    except InputError:
        if not _is_adapter(Path(source)):
            raise
    raise UnsupportedError(
        "is an adapter, expected a model: convert adapter brings it into another format, and merge puts it into a "
        "model",
        file=source,
    )


def _is_adapter(path: Path) -> bool:
    if not is_there(path):
        return False
    place = path if path.is_dir() else path.parent
    if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
        return True
    try:
        open_adapter(path)
    except InputError:
        return False
    return True


def _beside(request: ModelRequest) -> tuple[InputReport, ...]:
    found = []
    for role, path in (("vocabulary", request.vocab_from), ("imatrix", request.imatrix)):
        if path is not None:
            fingerprint = fingerprint_gguf(path)
            found.append(InputReport(role, str(path), "gguf", path.stat().st_size, fingerprint))
    return tuple(found)


def _facts(model: InputReport) -> Mapping[str, Fact]:
    return {
        "safelora.version": __version__,
        "safelora.model.name": plain_name(Path(model.path)),
        "safelora.model.fingerprint": model.fingerprint,
    }


def _report(
    output: ModelOutput,
    inputs: tuple[InputReport, ...],
    errors: Mapping[str, StoredError] | None,
    before: Unwritten | None,
) -> ConvertModelReport:
    losses = (*(before.losses if before else ()), *output.losses)
    tensors = [
        ConvertedTensor(one.name, one.shape, one.dtype, one.source_dtype, _error(errors, one.name, output))
        for one in output.tensors
    ]
    files = output.files
    written = None if errors is None else [OutputReport.of(path, path) for path in files]
    return ConvertModelReport(
        outtype=output.outtype,
        tensors=tuple(tensors),
        inputs=inputs,
        files=None if written is None else tuple(written),
        notes=(*losses, *(before.notes() if before else ()), *output.notes),
        losses=losses,
        planned_output=(str(files[0]), output.planned_bytes()),
    )


def _error(errors: Mapping[str, StoredError] | None, name: str, output: ModelOutput) -> float | None:
    """What rounding cost a tensor: nothing where it was copied, nobody knows what where llama.cpp did it."""
    if errors is None or (not errors and output.quantizes):
        return None
    return errors[name].relative if name in errors else 0.0


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
