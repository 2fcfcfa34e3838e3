"""Whole checkpoints converted and merged, in processes of their own: `python bench_checkpoints.py METHOD REQUEST`.

REQUEST is a `Request` as JSON; one line of JSON comes back on standard output. The clock starts after all imports.

    convert    safelora_gguf.model_conversion, from opening the checkpoint to the flushed GGUF file
    upstream   llama.cpp's convert_hf_to_gguf.py, from its arguments to the closed (not flushed) file
    merge      safelora_gguf.merge_adapters into a safetensors directory, flushed
    peft       PEFT's merge_and_unload and transformers' save_pretrained (not flushed), the model loaded in its own type
    copy       reading all bytes of the checkpoint and writing as many, flushed
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench_outcome import Outcome, peak_resident, timed

if TYPE_CHECKING:
    from bench_models import Files

_CHUNK = 16 << 20
_TOKENIZER = Path(__file__).resolve().parents[1] / "safelora_gguf" / "tiny_family" / "aligned"
TITLES = {
    "convert": "`convert model`",
    "upstream": "convert_hf_to_gguf.py",
    "merge": "`merge`",
    "peft": "PEFT's merge_and_unload, save_pretrained",
    "copy": "copying the bytes",
}


@dataclass(frozen=True)
class Request:
    """One run; `model` and `adapter` are directories."""

    model: str
    adapter: str
    out: str
    outtype: str
    llama_cpp: str
    threads: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def conversions(model: Path, outputs: Path, outtype: str, llama_cpp: Path | None, threads: int) -> dict[str, Request]:
    wanted = Request(str(model), "", str(outputs / "ours.gguf"), outtype, str(llama_cpp or ""), threads)
    found = {"convert": wanted, "copy": replace(wanted, out=str(outputs / "copy"))}
    return found | ({"upstream": replace(wanted, out=str(outputs / "upstream.gguf"))} if llama_cpp else {})


def merges(model: Path, adapter: Path, outputs: Path, threads: int) -> dict[str, Request]:
    wanted = Request(str(model), str(adapter), "", "", "", threads)
    return {method: replace(wanted, out=str(outputs / method)) for method in ("merge", "peft", "copy")}


def with_tokenizer(files: Files, place: Path) -> Path:
    """The aligned model with a tokenizer beside it, which upstream's converter does not do without."""
    place.mkdir()
    for name in ("model.safetensors", "config.json"):
        (place / name).symlink_to((files.aligned / name).resolve())
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(_TOKENIZER / name, place / name)
    return place


def convert(request: Request) -> float:
    import torch

    from safelora_gguf import convert_model

    torch.set_num_threads(request.threads)
    return timed(lambda: convert_model(request.model, request.out, outtype=request.outtype))


def upstream(request: Request) -> float:
    sys.path[:0] = [f"{request.llama_cpp}/gguf-py", request.llama_cpp]
    import conversion
    import torch
    import transformers  # noqa: F401  # the script's own imports, before the clock starts

    conversion.load_all_models()
    torch.set_num_threads(request.threads)
    script = f"{request.llama_cpp}/convert_hf_to_gguf.py"
    sys.argv = [script, "--outtype", request.outtype, "--outfile", request.out, request.model]
    with contextlib.redirect_stdout(io.StringIO()):
        return timed(lambda: runpy.run_path(script, run_name="__main__"))


def merge(request: Request) -> float:
    import torch

    from safelora_gguf import merge_adapters

    torch.set_num_threads(request.threads)
    return timed(lambda: merge_adapters(request.model, [(request.adapter, 1.0)], request.out, device="cpu"))


def peft(request: Request) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request.threads)

    def merged() -> None:
        model = AutoModelForCausalLM.from_pretrained(request.model, dtype="auto")
        PeftModel.from_pretrained(model, request.adapter).merge_and_unload().save_pretrained(request.out)

    return timed(merged)


def copy(request: Request) -> float:
    def copied() -> None:
        chunk = bytearray(_CHUNK)
        Path(request.out).mkdir()
        for path in sorted(Path(request.model).iterdir()):
            with (
                path.open("rb", buffering=0) as source,
                (Path(request.out) / path.name).open("wb", buffering=0) as file,
            ):
                while count := source.readinto(chunk):
                    file.write(memoryview(chunk)[:count])
                os.fsync(file.fileno())

    return timed(copied)


METHODS: Mapping[str, Callable[[Request], float]] = {
    "convert": convert,
    "upstream": upstream,
    "merge": merge,
    "peft": peft,
    "copy": copy,
}


def main() -> None:
    seconds = METHODS[sys.argv[1]](Request(**json.loads(sys.argv[2])))
    print(json.dumps(asdict(Outcome(seconds, peak_resident=peak_resident()))))


if __name__ == "__main__":
    main()
