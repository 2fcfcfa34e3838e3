"""Ten thousand broken headers. Oracle: reading ends in success or in one of our errors, and never in anything else.

The seeds are sound files, packed by hand or by the safetensors package; mutations are seeded, so a failure repeats.
"""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from gguf_bytes import BIG, F16, LITTLE, Q8_0, STRING, UINT32, Packer, Tensor, adapter_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.adapters.gguf_check import check_adapter
from converters.errors import Error
from converters.fingerprint import fingerprint, fingerprint_gguf
from converters.gguf_header import read_gguf_header
from converters.safetensors_file import SafetensorsFile

TELLING = (0, 1, 2, 7, 63, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63)
PER_SEED = 2600


@dataclass(frozen=True)
class Seed:
    """A sound file, the length of its header, and what is done with a file of its format."""

    data: bytes
    header: int
    read: Callable[[Path], object]


def gguf_seed(packer: Packer, version: int) -> Seed:
    weights = [("blk.0.attn_q.weight", 64, 64), ("blk.1.attn_v.weight", 64, 32), ("output.weight", 64, 96)]
    tensors = []
    for place, (name, wide, out) in enumerate(weights):
        tensors.append(Tensor(f"{name}.lora_a", (32, wide), (0, F16, Q8_0)[place]))
        tensors.append(Tensor(f"{name}.lora_b", (out, 32), (Q8_0, 0, F16)[place]))
    keys = [
        *adapter_keys(packer),
        ("general.alignment", packer.uint32(32)),
        ("general.tags", packer.array(STRING, [packer.string("lora"), packer.string("safe")])),
        ("adapter.alora.invocation_tokens", packer.array(UINT32, [packer.u32(5), packer.u32(6)])),
    ]
    data = packer.file(keys, tensors, version=version)
    header = len(data) - sum(-(-tensor.size // 32) * 32 for tensor in tensors)
    return Seed(data, header, _read_gguf)


def safetensors_seed() -> Seed:
    shapes = {f"base_model.model.layers.{n}.q_proj.lora_{half}.weight": (4, 16) for n in range(3) for half in "AB"}
    table, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        table[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + 256]}  # type: ignore[dict-item]
        offset += 256
    header = json.dumps(table, separators=(",", ":")).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(offset)
    return Seed(data, 8 + len(header), lambda path: fingerprint([SafetensorsFile(path)]))


def _read_gguf(path: Path) -> object:
    header = read_gguf_header(path)
    values = [header.value(key) for key in header.entries]
    if header.byte_order == "little":
        check_adapter(header)
    return values, fingerprint_gguf(header)


SEEDS = {
    "gguf 3": gguf_seed(LITTLE, 3),
    "gguf 2": gguf_seed(LITTLE, 2),
    "gguf 3, big-endian": gguf_seed(BIG, 3),
    "safetensors": safetensors_seed(),
}


def mutations(seed: Seed, count: int, random: random.Random) -> Iterator[tuple[str, bytes, range]]:
    """How, the mutant, and which bytes of the header it hit; single bytes in turn, so that none is left out."""
    for number in range(count):
        data = bytearray(seed.data)
        at = number // 2 % seed.header if number % 2 else random.randrange(seed.header)
        how = "flip" if number % 2 else random.choice(("number", "truncate", "insert", "delete", "repeat", "bit"))
        width = 1
        if how == "flip":
            data[at] ^= random.randrange(1, 256)
        elif how == "bit":
            data[at] ^= 1 << random.randrange(8)
        elif how == "number":
            width = random.choice((4, 8))
            order = random.choice(("little", "big"))
            data[at : at + width] = (random.choice(TELLING) % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
        elif how == "truncate":
            del data[at:]
            width = seed.header - at
        elif how == "insert":
            data[at:at] = random.randbytes(random.randrange(1, 16))
        else:
            width = random.randrange(1, 16)
            data[at : at + width] = b"" if how == "delete" else bytes(data[at : at + width]) * 2
        yield how, bytes(data), range(at, min(at + width, seed.header))


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """In memory where there is such a place: these are many small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory) / "mutant"


@pytest.mark.parametrize("name", SEEDS)
def test_every_mutant_of_a_header_ends_in_success_or_in_our_error(scratch: Path, name: str) -> None:
    seed, path = SEEDS[name], scratch
    path.write_bytes(seed.data)
    seed.read(path)
    outcomes, hit, same = Counter[str](), set[int](), 0
    for number, (how, data, touched) in enumerate(mutations(seed, PER_SEED, random.Random(name))):
        path.write_bytes(data)
        try:
            seed.read(path)
            outcomes["read"] += 1
        except Error:
            outcomes["refused"] += 1
        except BaseException as error:
            pytest.fail(f"mutant {number} of {name} ({how} at {touched}): {type(error).__name__}: {error}")
        hit.update(touched)
        same += data == seed.data
    assert hit == set(range(seed.header))
    assert same < PER_SEED / 50
    assert outcomes["refused"] > outcomes["read"]


def test_there_are_ten_thousand_mutants() -> None:
    assert PER_SEED * len(SEEDS) >= 10_000


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(SEEDS)),
    splices=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 9), st.binary(max_size=12)), max_size=4),
    length=st.none() | st.integers(0, 900),
)
def test_whatever_is_spliced_in(
    scratch: Path, name: str, splices: list[tuple[int, int, bytes]], length: int | None
) -> None:
    seed, path = SEEDS[name], scratch
    data = bytearray(seed.data)
    for at, width, new in splices:
        data[at : at + width] = new
    path.write_bytes(data[:length])
    try:
        seed.read(path)
    except Error as error:
        assert error.exit_status == 3
