"""Checkpoints converted to GGUF. Oracles: upstream's convert_hf_to_gguf.py, to the bit and to the key; transformers'
logits against llama.cpp's.

Upstream is asked with the name of the pre-tokenizer, which it can't know for small vocabularies; ours has to find it.
"""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from conformance import peft_side
from conformance.checkpoints import VARIANTS, make_checkpoint
from conformance.ggml_side import logits_as_ggml
from conformance.gguf_side import tensors
from conformance.upstream_model import upstream_converter

from converters.architectures import KNOWN
from safelora_gguf.model_conversion import convert_model

pytestmark = pytest.mark.conformance

HERE = Path(__file__).parent
OUTTYPES = ("F32", "F16", "BF16", "Q8_0")

OURS_ALONE = "safelora."
"""Where our own keys start: what a file was made from and by which version."""

# What upstream does otherwise, by variant: names of tensors and keys, and the reason.
OTHERWISE: Mapping[str, tuple[str, str]] = {
    "llama-spm-json": (r"ggml\.scores$", "upstream gives all tokens one score, and loses the order of merges"),
    "gemma2-half": (r"norm\.weight$", "upstream adds the 1 of Gemma's norms in F16, and loses bits of the weight"),
}

WHOLE = [list(peft_side.TOKENS)]
SHORT = [list((peft_side.TOKENS * 2)[place : place + 3]) for place in range(0, 15, 3)]

# The product promises 0.02. Measured over all variants: F32 2e-5, but 2e-4 for six layers of ggml's GELU; F16 0.01.
F32_BOUND = 1e-3
BOUND = 0.02

Convert = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def checkpoint_of(root: Path) -> Callable[[str], Path]:
    """Makes each variant once, in a directory whose name says something."""
    return cache(lambda variant: make_checkpoint(VARIANTS[variant], root / f"Tiny-{variant}-Instruct-v0.1"))


@pytest.fixture(scope="module")
def theirs(root: Path, llama_cpp_sources: Path, checkpoint_of: Callable[[str], Path]) -> Iterator[Convert]:
    """Upstream's file of a variant in an outtype, made once."""
    with upstream_converter(llama_cpp_sources, root / "upstream.log") as convert:

        @cache
        def made(variant: str, outtype: str) -> Path:
            target = root / f"theirs-{variant}-{outtype}.gguf"
            return convert(checkpoint_of(variant), outtype.lower(), VARIANTS[variant].pre or "", target)

        yield made


@pytest.fixture(scope="module")
def ours(root: Path, checkpoint_of: Callable[[str], Path]) -> Convert:
    """Our file of a variant in an outtype, made once."""

    @cache
    def made(variant: str, outtype: str) -> Path:
        target = root / f"ours-{variant}-{outtype}.gguf"
        convert_model(checkpoint_of(variant), target, outtype=outtype)
        return target

    return made


def facts(path: Path) -> dict[str, Any]:
    """All metadata with its types, but for the counts in the file's head."""
    fields = gguf.GGUFReader(path).fields.items()
    return {key: (field.types, field.contents()) for key, field in fields if not key.startswith("GGUF.")}


def test_every_class_that_is_converted_is_tested() -> None:
    classes = {name for table in KNOWN if table.writing is not None for name in table.classes}
    assert classes == {variant.spec.model for variant in VARIANTS.values()}


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors(variant: str, outtype: str, ours: Convert, theirs: Convert) -> None:
    found, expected = tensors(ours(variant, outtype)), tensors(theirs(variant, outtype))
    assert found.keys() == expected.keys()
    assert {name: found[name][:2] for name in found} == {name: expected[name][:2] for name in found}
    assert [name for name in found if found[name] != expected[name] and not known(variant, name)] == []


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata(variant: str, outtype: str, ours: Convert, theirs: Convert) -> None:
    found = differences(ours(variant, outtype), theirs(variant, outtype))
    assert {key: values for key, values in found.items() if not known(variant, key)} == {}


@pytest.mark.parametrize("variant", OTHERWISE)
def test_the_exceptions_are_still_exceptions(variant: str, ours: Convert, theirs: Convert) -> None:
    left, right = ours(variant, "F32"), theirs(variant, "F32")
    found, expected = tensors(left), tensors(right)
    others = {*differences(left, right), *(name for name in found if found[name] != expected[name])}
    assert others and all(known(variant, name) for name in others)


@pytest.mark.llama
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant: str, ours: Convert, checkpoint_of: Callable[[str], Path]) -> None:
    """llama.cpp loads every type, and computes what transformers does.

    A value that lies half way between two of BF16 or Q8_0 may be rounded to the other one by ggml, which moves all
    that comes after it in the sequence. Short sequences stay clear of each other; a wrong file moves them all.
    """
    found = dict(zip(OUTTYPES, llama_logits([ours(variant, outtype) for outtype in OUTTYPES]), strict=True))
    whole, short = {}, {}
    for outtype in OUTTYPES:
        truth = logits_as_ggml(checkpoint_of(variant), outtype, [*WHOLE, *SHORT])
        assert found[outtype].shape == truth.shape
        assert truth.std() > 1, "the logits are too flat to tell anything"
        distances = np.abs(found[outtype] - truth).max(axis=1)
        whole[outtype] = distances[: len(WHOLE[0])].max()
        short[outtype] = np.median(distances[len(WHOLE[0]) :].reshape(len(SHORT), -1).max(axis=1))
    assert whole["F32"] < F32_BOUND and whole["F16"] < BOUND, whole
    assert max(short.values()) < BOUND, short


@pytest.mark.parametrize(("variant", "outtype"), [("llama", "BF16"), ("llama-spm", "F16"), ("gemma2", "F32")])
def test_as_stored(
    variant: str, outtype: str, checkpoint_of: Callable[[str], Path], theirs: Convert, tmp_path: Path
) -> None:
    """Without an outtype the file is upstream's for the type in which the checkpoint is stored."""
    convert_model(checkpoint_of(variant), tmp_path / "ours.gguf")
    assert tensors(tmp_path / "ours.gguf") == tensors(theirs(variant, outtype))
    assert differences(tmp_path / "ours.gguf", theirs(variant, outtype)) == {}


@pytest.mark.llama
@pytest.mark.parametrize("variant", ["mistral", "qwen2", "gemma3-published"])
def test_vocabulary_of_another_file(
    variant: str, checkpoint_of: Callable[[str], Path], theirs: Convert, tmp_path: Path
) -> None:
    """A checkpoint without any tokenizer gets upstream's vocabulary, and llama.cpp computes the same with it."""
    bare = Path(shutil.copytree(checkpoint_of(variant), tmp_path / checkpoint_of(variant).name))
    for file in bare.glob("*token*"):
        file.unlink()
    convert_model(bare, tmp_path / "ours.gguf", outtype="F32", vocab_from=theirs(variant, "Q8_0"))
    assert tensors(tmp_path / "ours.gguf") == tensors(theirs(variant, "F32"))
    assert differences(tmp_path / "ours.gguf", theirs(variant, "F32")) == {}
    found, expected = llama_logits([tmp_path / "ours.gguf", theirs(variant, "F32")])
    assert np.array_equal(found, expected)


def differences(ours: Path, theirs: Path) -> dict[str, tuple[object, object]]:
    """Key-values that are not the same, with types; None where one has none."""
    found, expected = facts(ours), facts(theirs)
    found = {key: value for key, value in found.items() if not key.startswith(OURS_ALONE)}
    keys = sorted(found.keys() | expected.keys())
    return {key: (found.get(key), expected.get(key)) for key in keys if found.get(key) != expected.get(key)}


def known(variant: str, name: str) -> bool:
    return variant in OTHERWISE and re.search(OTHERWISE[variant][0], name) is not None


def llama_logits(models: Sequence[Path]) -> list[np.ndarray]:
    """llama.cpp's logits of `WHOLE` and `SHORT` for each model, from a child process."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    lists = ":".join(",".join(map(str, tokens)) for tokens in (*WHOLE, *SHORT))
    command = [sys.executable, str(HERE / "llama_models_child.py"), lists, *map(str, models)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    log = done.stderr.decode("utf-8", "replace")[-2000:]
    assert done.returncode == 0, f"llama.cpp ended with {done.returncode}:\n{log}"
    arrays = np.load(io.BytesIO(done.stdout))
    return [arrays[name] for name in arrays.files]
