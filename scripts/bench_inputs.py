"""What the benchmarks run on, from the command line's options: models in a directory, and each method's request."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bench_dequantize
import typer
from bench_methods import METHODS, Request
from bench_models import Files, Shape, make_files, make_references, warm
from gguf import GGMLQuantizationType as QType

from converters.errors import UnsupportedError
from converters.rounding import is_exact

_THRESHOLD = 0.35


@contextlib.contextmanager
def whole_models(directory: Path | None, shape: Shape) -> Iterator[tuple[Files, Path]]:
    """A synthetic model in the page cache, and a place for outputs on the same device."""
    if shape.hidden % 512:
        raise typer.BadParameter(f"{shape.hidden} is no multiple of 512", param_hint="--hidden")
    with (
        model_files(directory, shape, None) as files,
        tempfile.TemporaryDirectory(dir=None if directory is None else directory.parent) as out,
    ):
        warm((files.base, files.aligned))
        yield files, Path(out)


@contextlib.contextmanager
def model_files(directory: Path | None, shape: Shape, qtype: QType | None) -> Iterator[Files]:
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="safelora-bench-"))) / "model"
        try:
            files = make_files(directory, shape, say)
        except FileExistsError as error:
            raise typer.BadParameter(str(error), param_hint="--dir") from None
        if qtype is not None:
            try:
                make_references(files, qtype, say)
            except UnsupportedError as error:
                raise typer.BadParameter(str(error), param_hint="--references") from None
        yield files


def requests_for(
    files: Files, qtype: QType | None, outputs: Path, *, device: str, threads: int, subspace: int | None
) -> dict[str, Request]:
    exact = qtype is None or is_exact(qtype)  # noise lifts all cosines: no B would be left to compare
    return {
        method: Request(
            base=str(files.base if qtype is None else files.reference("base", qtype)),
            aligned=str(files.aligned if qtype is None else files.reference("aligned", qtype)),
            adapter=str(files.adapter(subspace is not None)),
            out=str(outputs / f"{method}.{'gguf' if method == 'ours' else 'safetensors'}"),
            threshold=_THRESHOLD if subspace is None and exact else None,
            subspace_rank=subspace,
            device=device,
            threads=threads,
        )
        for method in METHODS
        if qtype is None or method != "arithmetic"
    }


def reference_type(name: str, shape: Shape, subspace: int | None) -> QType:
    qtype = type_named(name, "--references")
    if not all(bench_dequantize.fits(qtype, columns) for _, columns in shape.projections().values()):
        message = f"rows of {shape.hidden} and {shape.ffn} are no whole blocks of {qtype.name}"
        raise typer.BadParameter(message, param_hint="--references")
    if subspace is not None and not is_exact(qtype):
        message = f"in {qtype.name}, ours leaves out the directions under the noise and the plain method does not"
        raise typer.BadParameter(message, param_hint="--subspace")
    return qtype


def type_named(name: str, option: str) -> QType:
    try:
        return QType[name.upper()]
    except KeyError:
        raise typer.BadParameter(f"gguf-py knows no type {name!r}", param_hint=option) from None


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
