"""The synthetic model that the benchmarks run on: base, aligned and adapter in a directory, written as a stream.

Shapes are TinyLlama's unless told otherwise. The aligned model is the base plus, in every weight, eight directions of
falling strength and Gaussian noise; the directions' strength differs from layer to layer, so that some modules fall
under the paper's threshold and some do not. Everything follows from fixed seeds. At most one tensor is in memory.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_gguf import write_model
from gguf import GGMLQuantizationType as QType

from converters.safetensors_file import write_safetensors
from converters.tensors import TensorInfo

VERSION = 1  # of the recipe below; another number means that old directories are made again
VOCABULARY = 32000
HEAD = 64  # entries per attention head
SUBSPACE_MODULES = ("q_proj", "v_proj", "down_proj")  # of layer 0: a full SVD of all would take minutes

_MARK = "bench.json"
_WEIGHT, _NOISE, _DIRECTIONS, _DECAY = 0.02, 5e-4, 8, 0.85
_STRENGTHS = (400.0, 120.0, 40.0, 10.0)  # energy of the first direction over the noise's, layer by layer


@dataclass(frozen=True)
class Shape:
    """A synthetic model's size; `hidden` a multiple of 512, so that 8 query heads share a key-value head."""

    layers: int = 11
    hidden: int = 2048
    rank: int = 16

    @property
    def ffn(self) -> int:
        return self.hidden * 11 // 4

    @property
    def heads(self) -> int:
        return self.hidden // HEAD

    @property
    def key_value_heads(self) -> int:
        return self.heads // 8

    def projections(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven projections of a layer."""
        key_value = self.key_value_heads * HEAD
        attention = {"q": self.hidden, "k": key_value, "v": key_value, "o": self.hidden}
        names = {f"self_attn.{name}_proj": (rows, self.hidden) for name, rows in attention.items()}
        names |= {f"mlp.{name}_proj": (self.ffn, self.hidden) for name in ("gate", "up")}
        return names | {"mlp.down_proj": (self.hidden, self.ffn)}

    def modules(self) -> Iterator[tuple[str, tuple[int, int], int]]:
        """Name, (out, in) and layer of every adapted module."""
        for layer in range(self.layers):
            for name, shape in self.projections().items():
                yield f"model.layers.{layer}.{name}", shape, layer


@dataclass(frozen=True)
class Files:
    """Where a synthetic model lies."""

    root: Path
    shape: Shape

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def aligned(self) -> Path:
        return self.root / "aligned"

    @property
    def gguf(self) -> Path:
        return self.root / "gguf"

    def reference(self, role: str, qtype: QType) -> Path:
        """`base` or `aligned` as GGUF."""
        return self.gguf / f"{role}-{qtype.name}.gguf"

    def adapter(self, subspace: bool = False) -> Path:
        return self.root / ("adapter-three" if subspace else "adapter")

    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.root.rglob("*.safetensors"))


def make_files(root: Path, shape: Shape, say: Callable[[str], None] = lambda _: None) -> Files:
    """The files of a shape in `root`: those that are there when they are complete, else new ones.

    Raises:
        FileExistsError: `root` holds something that is no synthetic model.
    """
    files = Files(root, shape)
    recipe = {"version": VERSION, **asdict(shape)}
    mark = root / _MARK
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == recipe:
        return files
    ours = (files.base, files.aligned, files.adapter(), files.adapter(subspace=True), files.gguf)
    if root.exists() and any(path not in (*ours, mark) for path in root.iterdir()):
        raise FileExistsError(f"{root} holds other things; name an empty directory")
    say(f"making base and aligned model and adapter in {root}")
    mark.unlink(missing_ok=True)
    for directory in ours:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    _write_model(files.base, shape, aligned=False)
    _write_model(files.aligned, shape, aligned=True)
    for subspace in (False, True):
        _write_adapter(files.adapter(subspace), shape, subspace)
    mark.write_text(json.dumps(recipe), encoding="utf-8")
    return files


def make_references(files: Files, qtype: QType, say: Callable[[str], None] = lambda _: None) -> None:
    """The base and the aligned model as GGUF files, unless they are there."""
    files.gguf.mkdir(exist_ok=True)
    for role, source in (("base", files.base), ("aligned", files.aligned)):
        path = files.reference(role, qtype)
        if not path.exists():
            say(f"writing {path}")
            write_model(path.with_suffix(".part"), source, qtype).rename(path)


def warm(paths: Iterable[Path]) -> None:
    """Reads files once, all that directories hold, so that each run finds them in the page cache."""
    for path in (file for given in paths for file in ([given] if given.is_file() else given.rglob("*.safetensors"))):
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def _write_model(directory: Path, shape: Shape, *, aligned: bool) -> None:
    strengths = {f"{name}.weight": _STRENGTHS[layer % len(_STRENGTHS)] for name, _, layer in shape.modules()}
    shapes = {"model.embed_tokens.weight": (VOCABULARY, shape.hidden), "lm_head.weight": (VOCABULARY, shape.hidden)}
    shapes |= {f"{name}.weight": size for name, size, _ in shape.modules()}
    norms = [f"model.layers.{i}.{kind}_layernorm" for i in range(shape.layers) for kind in ("input", "post_attention")]
    infos = [TensorInfo(name, size, "BF16", 2 * math.prod(size)) for name, size in shapes.items()]
    infos += [
        TensorInfo(f"{name}.weight", (shape.hidden,), "BF16", 2 * shape.hidden) for name in (*norms, "model.norm")
    ]

    def give(name: str) -> list[bytes]:
        if name not in shapes:
            return [_stored(torch.ones(shape.hidden))]
        weight = _normal(f"base {name}", shapes[name]).mul_(_WEIGHT).bfloat16()
        if aligned:
            weight = _align(weight.float(), name, strengths.get(name, 0.0)).bfloat16()
        return [_stored(weight)]

    with (directory / "model.safetensors").open("wb") as file:
        write_safetensors(file, infos, give, {"format": "pt"})
    _write_json(directory / "config.json", _model_config(shape))


def _align(weight: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    rows, columns = weight.shape
    weight.add_(_normal(f"noise {name}", (rows, columns)), alpha=_NOISE)
    left = _normal(f"left {name}", (rows, _DIRECTIONS)) / math.sqrt(rows)
    right = _normal(f"right {name}", (columns, _DIRECTIONS)) / math.sqrt(columns)
    sizes = math.sqrt(strength * columns) * _NOISE * _DECAY ** torch.arange(_DIRECTIONS)
    return weight.addmm_(left * sizes, right.T)


def _write_adapter(directory: Path, shape: Shape, subspace: bool) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    for name, (rows, columns), layer in shape.modules():
        if not subspace or (layer == 0 and name.endswith(SUBSPACE_MODULES)):
            shapes[f"base_model.model.{name}.lora_A.weight"] = (shape.rank, columns)
            shapes[f"base_model.model.{name}.lora_B.weight"] = (rows, shape.rank)
    infos = [TensorInfo(name, size, "F32", 4 * math.prod(size)) for name, size in shapes.items()]
    with (directory / "adapter_model.safetensors").open("wb") as file:
        give = lambda name: [_stored(_normal(name, shapes[name]) * 0.01)]  # noqa: E731
        write_safetensors(file, infos, give, {"format": "pt"})
    targets = SUBSPACE_MODULES if subspace else tuple(name.split(".")[1] for name in shape.projections())
    _write_json(directory / "adapter_config.json", _adapter_config(shape.rank, targets))


def _normal(seed: str, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


def _stored(tensor: torch.Tensor) -> bytes:
    narrow = tensor.bfloat16() if tensor.dim() == 1 else tensor
    return narrow.contiguous().view(torch.uint8).numpy().tobytes()


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _model_config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _adapter_config(rank: int, targets: Sequence[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "synthetic/aligned",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
    }
