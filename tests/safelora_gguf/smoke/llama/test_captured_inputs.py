"""Captured inputs of weights. Oracle: what transformers gives the same modules, and PEFT with an adapter, in float32.

The models are small random ones of transformers' as F32 GGUF; llama.cpp keeps keys and values in half precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conformance import peft_side  # noqa: E402 - these import transformers
from conformance.checkpoints import VARIANTS, make_checkpoint  # noqa: E402
from conformance.specs import ATTENTION  # noqa: E402

from safelora_gguf import convert_adapter, convert_model  # noqa: E402
from safelora_gguf.smoke.protocol import AdapterChoice, Reading  # noqa: E402

pytestmark = [pytest.mark.llama, pytest.mark.conformance]

BOUND = 1e-3
DENSE = ("llama3-rope", "qwen2-yarn", "qwen3", "phi", "gemma2")
MIXTURES = ("mixtral", "qwen3moe")
PLACES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_qkv", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "gate_up_proj": "ffn_up", "down_proj": "ffn_down",
    "gate": "ffn_gate_inp",
}  # fmt: skip
_MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp|block_sparse_moe)\.(\w+)$")

Inputs = Mapping[str, Any]


def readings(rows: int) -> list[Reading]:
    """Tokens of a common beginning that is partly kept, then others; longer and shorter than a batch together."""
    random = np.random.default_rng(5)
    start = random.integers(3, rows, 9).tolist()
    found = [Reading((), ())]
    for length, keep in (
        (40, None),
        (7, [0, 3, 6]),
        (90, range(50, 90)),
        (30, [2, 7, 8, 9, 29]),
        (100, None),
        (20, []),
    ):
        tokens = (*start, *random.integers(3, rows, length).tolist())
        found.append(Reading(tokens, tuple(range(len(tokens)) if keep is None else keep)))
    return found


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A checkpoint and its F32 GGUF."""

    def made(variant: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(variant)
        checkpoint = make_checkpoint(VARIANTS[variant], root / "checkpoint")
        convert_model(checkpoint, root / "model.gguf", outtype="f32")
        return checkpoint, root / "model.gguf"

    return cache(made)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs_of_modules(model: Any, read: Sequence[Reading]) -> tuple[Inputs, Inputs]:
    """By GGUF name: inputs (rows, width) of linear modules at the kept positions; and of the experts' modules their
    inputs with the experts that each row went to (rows, used)."""
    seen: dict[str, Any] = {}
    routed: dict[str, Any] = {}
    model = getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model
    for name, module in model.named_modules():
        match = _MODULE.search(name)
        if match and match[2] in PLACES:
            weight = f"blk.{match[1]}.{PLACES[match[2]]}.weight"
            module.register_forward_pre_hook(lambda _m, given, weight=weight: seen.__setitem__(weight, given[0]))
        if match and match[2] == "experts":
            module.register_forward_pre_hook(
                lambda m, given, layer=match[1]: routed.__setitem__(layer, (m, given[0], given[1]))
            )
    dense: dict[str, list[Any]] = {}
    stacks: dict[str, list[Any]] = {}
    with torch.no_grad():
        for reading in read:
            if not reading.tokens or not reading.keep:
                continue
            model(input_ids=torch.tensor([reading.tokens]))
            keep = list(reading.keep)
            for weight, given in seen.items():
                dense.setdefault(weight, []).append(given.reshape(len(reading.tokens), -1)[keep].numpy())
            for layer, (module, given, experts) in routed.items():
                x, chosen = given.reshape(len(reading.tokens), -1)[keep], experts[keep]
                stacks.setdefault(layer, []).append((x.numpy(), down_inputs(module, x, chosen).numpy(), chosen.numpy()))
    return {weight: np.concatenate(rows) for weight, rows in dense.items()}, {
        layer: tuple(np.concatenate(parts) for parts in zip(*rows, strict=True)) for layer, rows in stacks.items()
    }


def down_inputs(module: Any, x: Any, chosen: Any) -> Any:
    """silu(gate x) * up x of each chosen expert, (rows, used, width)."""
    gate, up = torch.einsum("rk,ruok->ruo", x, module.gate_up_proj[chosen]).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def by_expert(inputs: Any, experts: Any) -> Any:
    """Inputs (rows, used, width) in the order of their experts' numbers."""
    return np.take_along_axis(inputs, np.argsort(experts)[..., None], 1)


def error(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "adapter"])
@pytest.mark.parametrize("variant", [*DENSE, *MIXTURES])
def test_inputs_are_transformers(
    variant: str,
    adapted: bool,
    *,
    model_of: Callable[[str], tuple[Path, Path]],
    engine: Any,
    capture: Any,
    tmp_path: Path,
) -> None:
    checkpoint, file = model_of(variant)
    model = peft_side.load_model(checkpoint)
    loaded = engine(file)
    read = readings(model.config.get_text_config().vocab_size)
    before, _ = inputs_of_modules(model, read)
    if adapted:
        targets = ["qkv_proj", "o_proj", "gate_up_proj"] if variant == "phi" else list(ATTENTION)
        peft_side.save_adapter(checkpoint, tmp_path / "adapter", {"target_modules": targets})
        convert_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf", base=checkpoint)
        loaded.set_adapters([AdapterChoice(str(tmp_path / "adapter.gguf"))])
        model = peft_side.load_adapted(checkpoint, tmp_path / "adapter")
    dense, stacks = inputs_of_modules(model, read)
    assert not adapted or error(dense["blk.1.attn_output.weight"], before["blk.1.attn_output.weight"]) > 0.1
    names = {f"blk.{layer}.ffn_{kind}_exps.weight" for layer in stacks for kind in ("gate", "up", "down")}
    found = capture(loaded, read, [*dense, *names])
    assert {weight for group in found.groups for weight in group.weights} == {*dense, *names}
    assert found.told == {key: (len(reading.keep), None) for key, reading in enumerate(read)}
    for weight, expected in dense.items():
        assert error(found.inputs(weight)[:, 0], expected) < BOUND, weight
    for layer, (x, down, chosen) in stacks.items():
        for kind, expected in (("gate", x[:, None]), ("up", x[:, None]), ("down", by_expert(down, chosen))):
            weight = f"blk.{layer}.ffn_{kind}_exps.weight"
            np.testing.assert_array_equal(np.sort(found.experts(weight)), np.sort(chosen))
            inputs, ours = found.inputs(weight), found.experts(weight)
            assert error(by_expert(inputs, ours) if kind == "down" else inputs, expected) < BOUND, weight


def test_weights_with_one_input_share_its_rows(
    model_of: Callable[[str], tuple[Path, Path]], engine: Any, capture: Any
) -> None:
    """Which ones do is transformers': its q, k and v read one norm's output, gate and up another's."""
    _, file = model_of("qwen3moe")
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    found = capture(engine(file), [Reading((4, 5, 6), (1, 2))], [f"blk.1.{kind}.weight" for kind in kinds])
    together = {frozenset(weight.split(".")[2] for weight in group.weights) for group in found.groups}
    assert together == {
        frozenset(("attn_q", "attn_k", "attn_v")), frozenset(("attn_output",)),
        frozenset(("ffn_gate_exps", "ffn_up_exps")), frozenset(("ffn_down_exps",)),
    }  # fmt: skip
    used = found.group("blk.1.ffn_gate_exps.weight").used
    sizes = [(group.rows, group.slots, group.used) for group in found.groups]
    assert sorted(sizes) == sorted([(2, 1, 0), (2, 1, 0), (2, 1, used), (2, used, used)])


def test_the_output_matrix_and_one_layer_alone(
    model_of: Callable[[str], tuple[Path, Path]], engine: Any, capture: Any
) -> None:
    """The head's input is transformers' last hidden state; embeddings that are tied stand in for it."""
    for variant, head in (("qwen2-yarn", "output.weight"), ("llama3-rope", "token_embd.weight")):
        checkpoint, file = model_of(variant)
        read = Reading(tuple(range(3, 60)), (0, 5, 56))
        found = capture(engine(file), [read], [head])
        with torch.no_grad():
            hidden = peft_side.load_model(checkpoint).model(input_ids=torch.tensor([read.tokens])).last_hidden_state
        assert error(found.inputs(head)[:, 0], hidden[0, list(read.keep)].numpy()) < BOUND
