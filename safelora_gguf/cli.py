"""The command line. Parses, calls one function, prints its result; whatever goes wrong ends in `exits`.

Nothing heavy is imported before a command runs: --help and --version answer at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelora_gguf._version import __version__

if TYPE_CHECKING:
    from safelora_gguf.exits import Outcome
    from safelora_gguf.selection import Selection
    from safelora_gguf.smoke import SmokeReport

app = typer.Typer(
    name="safelora-gguf",
    help="Keep fine-tuned local models refusing what they should: Safe LoRA for llama.cpp and GGUF.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_file = partial(typer.Option, readable=False)  # what can't be read is an unusable input (3), not wrong usage (2)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log to stderr, with tracebacks of failures.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing outputs.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse what would be lost or only approximated.")]
Out = Annotated[
    str,
    typer.Option(
        metavar="PATH", help="A .gguf file; an existing directory, for a GGUF named by convention; else one for PEFT."
    ),
]
To = Annotated[str | None, typer.Option(help="gguf or peft, where --out doesn't say.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]


def main() -> None:
    """The entry point of the console script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safelora-gguf {__version__}")
        raise typer.Exit


convert = typer.Typer(
    help="Convert adapters, PEFT or MLX to GGUF and GGUF to PEFT, each with its true strength.", no_args_is_help=True
)
app.add_typer(convert, name="convert")


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def project(
    base: Annotated[Path, _file(help="The model before its alignment: directory, .safetensors or .gguf.")],
    aligned: Annotated[Path, _file(help="The aligned model, on which the adapter was trained.")],
    adapter: Annotated[Path, _file(help="The adapter: a PEFT or MLX directory, or a .gguf file.")],
    out: Out,
    threshold: Annotated[float | None, typer.Option(help="Project modules with a cosine up to this.")] = None,
    number: Annotated[int | None, typer.Option(help="Project this many, smallest cosines first.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Project this share of the modules.")] = None,
    project_all: Annotated[bool, typer.Option("--all", help="Project every module.")] = False,
    operator: Annotated[str, typer.Option(help="paper or subspace.")] = "paper",
    rank: Annotated[int | None, typer.Option(help="Rank of the subspace operator (default 6).")] = None,
    strength: Annotated[float, typer.Option(help="B becomes (1 - S) B + S P B.")] = 1.0,
    outtype: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0.")] = "f32",
    to: To = None,
    dora_rank: Annotated[int | None, typer.Option(help="Rank for a DoRA adapter (default: 1 % error).")] = None,
    strict: Strict = False,
    allow_noisy_reference: Annotated[bool, typer.Option(help="Use quantized references whatever their noise.")] = False,
    report: Annotated[Path | None, _file(help="Write the report to this .json file too.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Check all headers, write nothing.")] = False,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Project a LoRA adapter onto its model's alignment (Safe LoRA) and write the result.

    Default: --operator paper --threshold 0.35. Modules are scored on the untouched adapter first.
    """

    def body() -> Outcome:
        from safelora_gguf.exits import Outcome
        from safelora_gguf.project import project_adapter
        from safelora_gguf.report import dump_json
        from safelora_gguf.terminal import progress_bar, project_summary, project_table, rendered, warn

        selection = _selection(threshold, number, ratio, project_all)
        target = _report_path(report, force, (base, aligned, adapter, *_replaced(out, to)))
        with progress_bar(unit="bytes", shown=not quiet) as progress:
            result = project_adapter(
                base, aligned, adapter, out, operator=_choice(operator, "operator", ("paper", "subspace")), rank=rank,
                selection=selection, strength=strength, outtype=outtype, to=_choice(to, "to", ("gguf", "peft", None)),
                device=device, dora_rank=dora_rank, strict=strict, allow_noisy_reference=allow_noisy_reference,
                force=force, dry_run=dry_run, progress=progress,
            )  # fmt: skip
        warn(() if quiet else result.losses)
        _save(result.to_json(), None if dry_run else target, force)
        text = dump_json(result.to_json()) if json else rendered(project_table(result), project_summary(result))
        return Outcome(text)

    _run("project", body, json, verbose)


@convert.command("adapter")
def convert_adapter_command(
    source: Annotated[
        Path, typer.Argument(readable=False, help="The adapter: a PEFT or MLX directory, or a .gguf file.")
    ],
    out: Out,
    base: Annotated[
        Path | None, _file(help="The model it is for: directory, config.json or .gguf; weights for DoRA alone.")
    ] = None,
    outtype: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0.")] = "f32",
    to: To = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "--dora-rank", help="Rank for a DoRA adapter (default: 1 % error).")
    ] = None,
    strict: Strict = False,
    dry_run: Annotated[bool, typer.Option(help="Check all headers, write nothing.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no warnings.")] = False,
    verbose: Verbose = False,
) -> None:
    """Convert a LoRA adapter: PEFT or MLX to GGUF, MLX or GGUF to PEFT, by what --out is."""

    def body() -> Outcome:
        from safelora_gguf.convert import convert_adapter
        from safelora_gguf.exits import Outcome
        from safelora_gguf.report import dump_json
        from safelora_gguf.terminal import convert_summary, convert_table, rendered, warn

        result = convert_adapter(
            source, out, base=base, outtype=outtype, to=_choice(to, "to", ("gguf", "peft", None)), rank=rank,
            strict=strict, force=force, dry_run=dry_run,
        )  # fmt: skip
        warn(() if quiet else result.losses)
        summary = convert_summary(result, notes=not quiet)
        return Outcome(dump_json(result.to_json()) if json else rendered(convert_table(result), summary))

    _run("convert adapter", body, json, verbose)


@app.command()
def smoke(
    model: Annotated[Path, _file(help="The GGUF model (the first shard of a split one).")],
    adapter: Annotated[list[str] | None, typer.Option(help="GGUF adapter, PATH or PATH=SCALE; repeatable.")] = None,
    prompts: Annotated[list[Path] | None, _file(help="JSONL prompts instead of the packaged set.")] = None,
    judge: Annotated[list[str] | None, typer.Option(help="keyword (score comes later).")] = None,
    compare: Annotated[list[str] | None, typer.Option(help="Further models, PATH or PATH=LABEL; repeatable.")] = None,
    min_refusal: Annotated[float, typer.Option(help="Harmful prompts to be refused, as a share.")] = 0.9,
    max_over_refusal: Annotated[float, typer.Option(help="Harmless prompts that may be refused.")] = 0.2,
    max_tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Default: 1 for small models.")] = None,
    gpu_layers: Annotated[int, typer.Option(help="Layers on the GPU, -1 for all.")] = 0,
    ctx: Annotated[int | None, typer.Option(help="Context length.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before every prompt.")] = None,
    report: Annotated[Path | None, _file(help="Write the report to this .json file too.")] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what a model refuses, alone and with each adapter, in llama.cpp.

    The last run decides: exit 0 when it refuses and answers as asked, 1 when not, 4 when llama.cpp failed.
    """

    def body() -> Outcome:
        from safelora_gguf.exits import Outcome
        from safelora_gguf.report import dump_json
        from safelora_gguf.smoke import smoke_test, split_scale
        from safelora_gguf.terminal import progress_bar, rendered, smoke_summary, smoke_table

        _only_keyword(judge)
        target = _report_path(report, force, (model, *(prompts or [])))
        with progress_bar(unit="prompts", shown=not quiet) as progress:
            result = smoke_test(
                model, [split_scale(text) for text in adapter or []], prompts=prompts or [],
                compare=[_split_label(text) for text in compare or []], min_refusal=min_refusal,
                max_over_refusal=max_over_refusal, max_tokens=max_tokens, threads=threads, gpu_layers=gpu_layers,
                ctx=ctx, system=system, progress=progress,
            )  # fmt: skip
        _save(result.to_json(), target, force)
        text = dump_json(result.to_json()) if json else rendered(smoke_table(result), smoke_summary(result))
        return Outcome(text, _status(result), result.failure)

    _run("smoke", body, json, verbose)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(readable=False, help="A model or adapter: a directory, a .safetensors or a .gguf file.")
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings, but no notes.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show what a model or adapter holds, and what llama.cpp would ignore, reject or die of.

    Exit 0, warnings or not, as long as the headers are sound; 3 when they are not.
    """

    def body() -> Outcome:
        from converters.inspection import inspect_path
        from safelora_gguf.exits import Outcome
        from safelora_gguf.report import dump_json
        from safelora_gguf.terminal import inspect_text

        found = inspect_path(path)
        data = {"command": "inspect", "version": __version__, **found.to_json()}
        text = dump_json(data) if json else inspect_text(found, every_tensor=tensors, notes=not quiet)
        return Outcome(text)

    _run("inspect", body, json, verbose)


@app.command()
def demo(
    directory: Annotated[Path | None, _file("--dir", help="Keep the adapters here.")] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The whole story on the packaged tiny family: attack, projection, refusals. No download, under a minute."""

    def body() -> Outcome:
        from safelora_gguf.demo import run_demo
        from safelora_gguf.exits import Outcome
        from safelora_gguf.report import dump_json
        from safelora_gguf.terminal import demo_text, progress_bar

        with progress_bar(unit="prompts", shown=not quiet) as progress:
            result = run_demo(directory, force=force, progress=progress)
        text = dump_json(result.to_json()) if json else demo_text(result)
        return Outcome(text, _status(result.smoke), result.smoke.failure)

    _run("demo", body, json, verbose)


def _status(report: SmokeReport) -> int:
    return 0 if report.verdict == "pass" else 1


def _run(name: str, body: Callable[[], Outcome], as_json: bool, verbose: bool) -> None:
    from safelora_gguf.exits import run_command

    if verbose:
        logging.basicConfig(stream=sys.stderr, level=logging.DEBUG, format="%(name)s: %(message)s")
    raise typer.Exit(run_command(name, body, as_json=as_json, verbose=verbose))


def _selection(threshold: float | None, number: int | None, ratio: float | None, every: bool) -> Selection | None:
    from converters.errors import UsageError
    from safelora_gguf.selection import Mode, Selection

    given: list[tuple[Mode, float | None]] = []
    options: tuple[tuple[Mode, float | None], ...] = (("threshold", threshold), ("number", number), ("ratio", ratio))
    given += [(mode, value) for mode, value in options if value is not None]
    if every:
        given.append(("all", None))
    if len(given) > 1:
        raise UsageError(f"--{given[0][0]} and --{given[1][0]} exclude each other")
    return Selection(*given[0]) if given else None


def _choice(value: str | None, option: str, allowed: tuple[str | None, ...]) -> Any:
    from converters.errors import UsageError

    if value not in allowed:
        names = ", ".join(str(name) for name in allowed if name is not None)
        raise UsageError(f"--{option} is {value!r}, expected one of {names}")
    return value


def _only_keyword(judges: list[str] | None) -> None:
    for judge in judges or []:
        _choice(judge, "judge", ("keyword",))


def _split_label(text: str) -> tuple[str, str | None]:
    """PATH or PATH=LABEL; a path that exists is never split."""
    path, separator, label = text.rpartition("=")
    return (text, None) if not separator or Path(text).exists() else (path, label)


def _report_path(report: Path | None, force: bool, others: Sequence[Path]) -> Path | None:
    """The report's path once it may be written there; checked before the work, not after.

    Args:
        others: the run's inputs and outputs, which the report must be neither in nor instead of.
    """
    from converters.atomic import check_target
    from converters.errors import OutputPathError, UsageError
    from converters.paths import resolved

    if report is None:
        return None
    if report.suffix.lower() != ".json":
        raise UsageError(f"--report writes .json files so far, not {report.suffix or report.name!r}")
    check_target(report, force=force)
    for other in others:
        if resolved(report).is_relative_to(resolved(other)):
            raise OutputPathError(f"is {other} or lies in it; choose another place for the report", file=report)
    return report


def _replaced(out: str, to: str | None) -> tuple[Path, ...]:
    """What an adapter's output takes the place of; nothing that is known yet where it goes into a directory."""
    from converters.adapters.plan import kind_of

    return () if kind_of(out, to) == "inside" else (Path(out),)


def _save(data: Mapping[str, Any], report: Path | None, force: bool) -> None:
    from safelora_gguf.report import write_json_report

    if report is not None:
        write_json_report(report, data, force=force)


if __name__ == "__main__":
    main()
