"""Converting a large adapter against copying its bytes, and against llama.cpp's own converter.

The adapter is one of rank 64 on all seven projections of a Llama of 7 billion parameters, in BF16. What `copy` does is
the least that any converter must do: read the source, write and flush as many bytes as the output has.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from bench_agreement import DisagreementError
from bench_convert_methods import Request
from bench_models import warm
from bench_runs import Series, run_in_turns

from converters.safetensors_file import SafetensorsFile, write_safetensors
from converters.tensors import TensorInfo
from safelora_gguf import convert_adapter

HEAD = ("conversion", "method", "median s", "min to max s", "beyond copying s", "peak anonymous", "MB written")

_HIDDEN, _FFN, _HEADS = 4096, 11008, 32
_ATTENTION = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (_HIDDEN, _HIDDEN))
_PROJECTIONS = {
    **_ATTENTION,
    "mlp.gate_proj": (_FFN, _HIDDEN),
    "mlp.up_proj": (_FFN, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _FFN),
}
_TITLES = {"ours": "convert adapter", "copy": "reading and writing the bytes", "upstream": "convert_lora_to_gguf.py"}
_SCRIPT = "bench_convert_methods.py"
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Size:
    """Of the adapter."""

    layers: int
    rank: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of all its tensors."""
        found = {}
        for layer in range(self.layers):
            for name, (rows, columns) in _PROJECTIONS.items():
                key = f"base_model.model.model.layers.{layer}.{name}"
                found |= {f"{key}.lora_A.weight": (self.rank, columns), f"{key}.lora_B.weight": (rows, self.rank)}
        return found

    def subject(self, runs: int, threads: int) -> str:
        shapes = self.shapes()
        nbytes = 2 * sum(map(math.prod, shapes.values()))
        return (
            f"convert: LoRA rank {self.rank} on {len(shapes) // 2} modules of {self.layers} layers, hidden {_HIDDEN}, "
            f"ffn {_FFN}, {nbytes / 1e6:,.0f} MB in BF16, in the page cache; {threads} cores, {runs} runs each"
        )


@dataclass(frozen=True)
class Timings:
    """All runs of one conversion by method."""

    title: str
    nbytes: int
    series: Mapping[str, Series]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """As under `HEAD`."""
        least = self.series["copy"].median
        for method, found in self.series.items():
            beyond = "" if method == "copy" else f"{found.median - least:+.2f}"
            spread = f"{min(found.seconds):.2f} to {max(found.seconds):.2f}"
            memory = "unknown" if found.peak_anonymous is None else f"{found.peak_anonymous / 1e6:,.0f} MB"
            size = f"{self.nbytes / 1e6:,.0f}"
            yield (self.title, _TITLES[method], f"{found.median:.2f}", spread, beyond, memory, size)

    def to_json(self) -> dict[str, object]:
        methods = {name: found.to_json() for name, found in self.series.items()}
        return {"conversion": self.title, "written_bytes": self.nbytes, "methods": methods}


def measure(
    root: Path, size: Size, runs: int, *, threads: int, llama_cpp: Path | None, say: Callable[[str], None]
) -> list[Timings]:
    """Makes the adapter in `root` and converts it in all ways, the methods of one conversion in turns.

    Raises:
        ChildProcessError: a run failed; its error text is in the message.
        DisagreementError: ours and upstream's files, or the adapter before and after, differ.
    """
    say(f"making an adapter of {size.layers} layers and rank {size.rank}")
    adapter = make_adapter(root / "adapter", size)
    warm([adapter])
    plan = Request(str(adapter), str(adapter / _WEIGHTS), str(adapter), "", "", 0, str(llama_cpp or ""), threads)
    found = []
    for outtype in ("f32", "f16", "q8_0"):
        into = replace(plan, out=str(root / f"{outtype}.gguf"), outtype=outtype)
        found.append(_measure(f"PEFT to GGUF {outtype.upper()}", into, runs, say))
        if llama_cpp is not None:
            compare_gguf(Path(into.out), _out_of("upstream", into))
    back = replace(plan, source=str(root / "f32.gguf"), tensor_file=str(root / "f32.gguf"), llama_cpp="")
    back = replace(back, out=str(root / "back"), outtype="f32")
    found.append(_measure("GGUF F32 to PEFT", back, runs, say))
    _compare_peft(adapter / _WEIGHTS, root / "back" / _WEIGHTS)
    return found


def make_adapter(directory: Path, size: Size) -> Path:
    """A PEFT directory with its base's config.json in it."""
    shapes, rank = size.shapes(), size.rank
    infos = [TensorInfo(name, shape, "BF16", 2 * math.prod(shape)) for name, shape in shapes.items()]
    directory.mkdir(parents=True)
    with (directory / _WEIGHTS).open("wb") as file:
        write_safetensors(file, infos, lambda name: [_noise(name, shapes[name])], {"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "synthetic/model"}
    (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(_model_config(size.layers)), encoding="utf-8")
    return directory


def _measure(title: str, plan: Request, runs: int, say: Callable[[str], None]) -> Timings:
    say(title)
    convert_adapter(plan.source, plan.out, base=plan.base, outtype=plan.outtype)
    out = Path(plan.out)
    plan = replace(plan, nbytes=sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir())))
    methods = ("ours", "copy", "upstream") if plan.llama_cpp else ("ours", "copy")
    requests = {method: replace(plan, out=str(_out_of(method, plan))) for method in methods}
    return Timings(title, plan.nbytes, run_in_turns(requests, runs, say, _SCRIPT))


def _out_of(method: str, plan: Request) -> Path:
    return Path(plan.out) if method == "ours" else Path(plan.out).with_name(f"{method}-{Path(plan.out).name}")


def compare_gguf(ours: Path, theirs: Path) -> None:
    """Two GGUF files tensor by tensor, bit by bit.

    Raises:
        DisagreementError: they differ.
    """
    found, expected = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (ours, theirs))
    different = {name for name in found.keys() & expected.keys() if not _same(found[name], expected[name])}
    different |= found.keys() ^ expected.keys()
    if different:
        raise DisagreementError(f"ours and upstream's differ in {', '.join(sorted(different)[:5])}")


def _same(one: gguf.ReaderTensor, other: gguf.ReaderTensor) -> bool:
    return one.tensor_type == other.tensor_type and np.array_equal(one.data, other.data)


def _compare_peft(before: Path, after: Path) -> None:
    """Every value as it was: BF16 to F32 and there again loses nothing."""
    source, result = SafetensorsFile(before), SafetensorsFile(after)
    different = source.infos.keys() ^ result.infos.keys()
    common = source.infos.keys() & result.infos.keys()
    different |= {name for name in common if not torch.equal(source.load(name).float(), result.load(name))}
    if different:
        raise DisagreementError(f"the adapter came back different in {', '.join(sorted(different)[:5])}")


def _noise(seed: str, shape: Sequence[int]) -> bytes:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode()))) * 0.01
    return values.bfloat16().view(torch.uint8).numpy().tobytes()


def _model_config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": _FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
