"""Ten thousand broken headers. Oracle: whatever commands do with them ends in success or in one of our errors, and
never in anything else; and the field maps of `header_seeds`, which say that no field was left out.

The seeds are sound files, packed by hand; mutations are seeded, so a failure repeats.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
from header_seeds import ADAPTED, SEEDS, Field, Seed
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.adapters.gguf_check import check_adapter
from converters.errors import Error
from converters.fingerprint import fingerprint_gguf
from converters.gguf_header import read_gguf_header
from converters.inspection import inspect_path
from converters.opening import open_adapter, open_model

NUMBERS = (0, 1, 2, 3, 4, 7, 9, 13, 33, 63, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
WORDS = (b"null", b"true", b"[]", b"{}", b'""', b"-1", b"1.5", b"NaN", b"Infinity", b"1e999", b"9" * 40, b'"\\ud800"',
         b'"../x"', b'"\\u001b[2J"', b'{"a":[{}]}', b"[[[[]]]]", b'"I8"', b'"F64"', b"")  # fmt: skip
SHARES = {
    "GGUF 3 model": 0.83, "GGUF 2 model": 0.89, "GGUF 3 model, big-endian": 0.89, "GGUF 3 adapter": 0.93,
    "GGUF 2 adapter, big-endian": 0.93, "first shard": 0.9, "second shard": 0.86, "safetensors model": 0.93,
    "PEFT adapter": 0.95, "index of shards": 0.91, "config.json": 0.84, "adapter_config.json": 0.83,
}  # fmt: skip
"""Of the mutants of each seed, what share is refused at least: what was measured, less 0.04."""


def mutants(seed: Seed) -> int:
    """As many as it takes to change each byte at least once, and enough for ten thousand in all."""
    return max(850, 3 * seed.header)


def mutations(seed: Seed, random: random.Random) -> Iterator[tuple[str, bytes, range]]:
    """How, the mutant, and which bytes of the header it changed; single bytes in turn, so that none is left out."""
    for number in range(mutants(seed)):
        if number % 3 == 0:
            at = number // 3 % seed.header
            yield (
                "flip",
                _spliced(seed.data, at, 1, bytes([seed.data[at] ^ random.randrange(1, 256)])),
                range(at, at + 1),
            )
        elif number % 3 == 1:
            found = random.choice(seed.fields)
            new = _other(found, seed, random)
            yield (
                "field",
                _spliced(seed.data, found.start, found.stop - found.start, new),
                range(found.start, found.stop),
            )
        else:
            yield _anywhere(seed, random)


def _other(found: Field, seed: Seed, random: random.Random) -> bytes:
    """Another value for a field: of its own width in a binary header, any in a text."""
    if seed.order is None and found.kind != "header length":
        return random.choice(WORDS)
    width = found.stop - found.start
    order = "big" if seed.order == ">" else "little"
    return (random.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]


def _anywhere(seed: Seed, random: random.Random) -> tuple[str, bytes, range]:
    at, width = random.randrange(seed.header), random.randrange(1, 16)
    how = random.choice(("number", "truncate", "insert", "delete", "repeat"))
    if how == "truncate":
        return how, seed.data[:at], range(at, seed.header)
    if how == "insert":
        return how, _spliced(seed.data, at, 0, random.randbytes(width)), range(at, at + 1)
    old = seed.data[at : at + width]
    if how == "number":
        width = random.choice((4, 8))
        number = random.choice(NUMBERS) % (1 << 8 * width)
        new = number.to_bytes(width, random.choice(("little", "big")))
    else:
        new = b"" if how == "delete" else old * 2
    return how, _spliced(seed.data, at, width, new), range(at, min(at + width, seed.header))


def _spliced(data: bytes, at: int, width: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + width :]


class Subject:
    """A seed's files on disk, one of which is replaced again and again, and all that commands do with them."""

    def __init__(self, seed: Seed, directory: Path) -> None:
        for name, data in seed.files.items():
            (directory / name).write_bytes(data)
        self._target = directory / seed.target
        self._path = directory / seed.opened if seed.opened else directory
        self._uses: list[Callable[[], object]] = [self._as_adapter if seed.role == "adapter" else self._as_model]
        self._uses.append(self._as_model if seed.role == "adapter" else self._as_adapter)
        self._uses.append(lambda: json.dumps(inspect_path(self._path).to_json()))
        if seed.order is not None:
            self._uses.append(self._as_header)

    def refused(self, data: bytes) -> bool:
        """Whether the file cannot be used as what it was. Raises whatever is not an `Error`."""
        self._target.write_bytes(data)
        outcomes = []
        for use in self._uses:
            try:
                use()
                outcomes.append(False)
            except Error as error:
                assert error.exit_status == 3 and error.message
                outcomes.append(True)
        return outcomes[0]

    def _as_model(self) -> None:
        model = open_model(self._path)
        assert model.fingerprint() and model.architecture and model.heads() and model.nbytes
        for name, info in model.infos.items():
            rows = min(1, prod(info.shape[:-1]))
            if not info.dtype.startswith("I"):
                assert model.rows(name, 0, rows).shape == (rows, info.shape[-1] if info.shape else 1)

    def _as_adapter(self) -> None:
        adapter = open_adapter(self._path)
        assert adapter.fingerprint() and adapter.lora_alpha is not None
        for module, pair in adapter.pairs.items():
            a, b = adapter.load(module)
            out, into = pair.shape[::-1] if pair.embedding else pair.shape
            assert (a.shape, b.shape) == ((pair.rank, into), (out, pair.rank)) and pair.rank > 0
        model = self._target.with_name(ADAPTED)
        if model.exists():
            check_adapter(read_gguf_header(self._path), [read_gguf_header(model)], native=False)

    def _as_header(self) -> None:
        header = read_gguf_header(self._path)
        for key in header.entries:
            header.value(key)
        fingerprint_gguf(header)
        check_adapter(header, [header])


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """In memory where there is such a place: these are many small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


@pytest.mark.parametrize("name", SEEDS)
def test_every_mutant_of_a_header_ends_in_success_or_in_our_error(tmp_path: Path, name: str) -> None:
    seed = SEEDS[name]
    subject = Subject(seed, tmp_path)
    assert not subject.refused(seed.data)
    outcomes, hit, same = Counter[bool](), set[int](), 0
    refused_kinds: set[str] = set()
    for number, (how, data, touched) in enumerate(mutations(seed, random.Random(name))):
        same += data == seed.data
        try:
            refused = subject.refused(data)
        except BaseException as error:
            pytest.fail(f"mutant {number} of {name} ({how} at {touched}): {type(error).__name__}: {error}")
        outcomes[refused] += 1
        hit.update(touched)
        if refused:
            refused_kinds.update(f.kind for f in seed.fields if f.start <= touched.start and touched.stop <= f.stop)
    share = outcomes[True] / (sum(outcomes.values()) - same)
    assert hit == set(range(seed.header))
    assert share >= SHARES[name]
    assert {field.kind for field in seed.fields} - refused_kinds <= seed.legal


@pytest.mark.parametrize("name", SEEDS)
def test_the_fields_cover_the_header(name: str) -> None:
    fields = SEEDS[name].fields
    assert fields[0].start == 0
    assert all(first.stop == second.start for first, second in pairwise(fields))


def test_there_are_ten_thousand_mutants() -> None:
    assert sum(mutants(seed) for seed in SEEDS.values()) >= 10_000


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(SEEDS)),
    splices=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 9), st.binary(max_size=12)), max_size=4),
    length=st.none() | st.integers(0, 1800),
)
def test_whatever_is_spliced_in(
    scratch: Path, name: str, splices: list[tuple[int, int, bytes]], length: int | None
) -> None:
    seed = SEEDS[name]
    data = seed.data
    for at, width, new in splices:
        data = _spliced(data, at % seed.header, width, new)
    directory = scratch / name
    directory.mkdir(exist_ok=True)
    Subject(seed, directory).refused(data[:length])
