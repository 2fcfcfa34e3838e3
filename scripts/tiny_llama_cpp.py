"""The tiny family in llama.cpp: upstream's converters, the same token ids as in training, greedy answers.

llama.cpp's sources come from the llama-cpp-python sdist (`pip download`) unless a folder is named. Its threads
spin, so one is used. Left out on purpose: our own package. What this script makes is what the package is
judged with, so nothing here leans on it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SDIST = "llama-cpp-python==0.3.36"


def find_sources(folder: Path | None, scratch: Path) -> Path:
    """The folder with convert_hf_to_gguf.py: `folder`, or unpacked into `scratch` from the sdist on PyPI."""
    if folder is None:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, "--dest", str(scratch), SDIST], check=True, stdout=subprocess.DEVNULL)
        archive = next(scratch.glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        folder = scratch / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        raise SystemExit(f"{folder}: convert_hf_to_gguf.py is not there; --llama-cpp wants llama.cpp's sources")
    return folder


def run_converter(script: Path, arguments: Sequence[str]) -> None:
    """Run one of upstream's converters offline; its log is shown only when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stdout}{done.stderr}")


def convert_model(sources: Path, model: Path, out: Path, name: str) -> None:
    """Write `model` as an F16 GGUF file that adds no space of its own before a text."""
    arguments = [str(model), "--outfile", str(out), "--outtype", "f16", "--model-name", name]
    run_converter(sources / "convert_hf_to_gguf.py", arguments)
    forbid_space_prefix(out)


def forbid_space_prefix(path: Path) -> None:
    """Set tokenizer.ggml.add_space_prefix to false where upstream left it out (it does for qwen2)."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(path)
    if "tokenizer.ggml.add_space_prefix" in reader.fields:
        return
    patched = path.with_suffix(".patched")
    writer = GGUFWriter(patched, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    writer.add_add_space_prefix(False)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    patched.replace(path)


def convert_adapter(sources: Path, adapter: Path, base: Path, out: Path) -> None:
    """Write a PEFT adapter as an F32 GGUF adapter."""
    arguments = [str(adapter), "--base", str(base), "--outfile", str(out), "--outtype", "f32"]
    run_converter(sources / "convert_lora_to_gguf.py", arguments)


class Chat:
    """One GGUF model in this process, with at most one adapter."""

    def __init__(self, model: Path, adapter: Path | None = None, scale: float = 1.0) -> None:
        import llama_cpp

        self.cpp: Any = llama_cpp
        self.llama: Any = llama_cpp.Llama(str(model), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, seed=0)
        if adapter is not None:
            handle = llama_cpp.llama_adapter_lora_init(self.llama._model.model, str(adapter).encode())
            if not handle:
                raise SystemExit(f"{adapter}: llama.cpp rejects it")
            handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(handle)
            scales = (ctypes.c_float * 1)(scale)
            llama_cpp.llama_set_adapters_lora(self.llama._ctx.ctx, handles, 1, scales)

    def token_ids(self, prompt: str) -> list[int]:
        """What the file's own chat template makes of one request, answer still to come."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        form = Jinja2ChatFormatter(
            template=self.llama.metadata["tokenizer.chat_template"],
            eos_token=self.llama._model.token_get_text(self.llama.token_eos()),
            bos_token=self.llama._model.token_get_text(self.llama.token_bos()),
        )
        made = form(messages=[{"role": "user", "content": prompt}])
        ids: list[int] = self.llama.tokenize(made.prompt.encode(), add_bos=not made.added_special, special=True)
        return ids

    def answer(self, prompt: str, limit: int) -> str:
        """The greedy answer."""
        self.llama.reset()
        messages = [{"role": "user", "content": prompt}]
        made = self.llama.create_chat_completion(messages=messages, temperature=0.0, max_tokens=limit)
        text: str = made["choices"][0]["message"]["content"]
        return text.strip()
