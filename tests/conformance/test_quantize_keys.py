"""What a model says of the importance matrix that it was quantized with. Oracle: the source of llama.cpp's
llama-quantize, which writes the same keys."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest
from gguf_models import finish

from converters.gguf_header import read_gguf_header
from converters.importance_check import importance_entries

pytestmark = pytest.mark.conformance

_KEY = re.compile(r"(LLM_KV_QUANTIZE_\w+)\s*=\s*\"(quantize\.imatrix\.\w+)\"")
_SET = re.compile(r"strcpy\(kvo\.key, (LLM_KV_QUANTIZE_\w+)\);\s*kvo\.tag = LLAMA_KV_OVERRIDE_TYPE_(\w+);")


def test_the_keys_are_llama_quantizes(llama_cpp_sources: Path, tmp_path: Path) -> None:
    source = (llama_cpp_sources / "tools" / "quantize" / "quantize.cpp").read_text()
    names, kinds = dict(_KEY.findall(source)), dict(_SET.findall(source))
    assert len(names) == 4 and names.keys() == kinds.keys()
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "imatrix")
    writer.add_array("imatrix.datasets", ["a" * 200])
    writer.add_uint32("imatrix.chunk_count", 3)
    finish(writer)
    entries = importance_entries(read_gguf_header(tmp_path / "i.gguf"))
    assert set(entries) == set(names.values())
    for constant, key in names.items():
        kind = entries[key][8 + len(key)]
        assert kind == {"STR": gguf.GGUFValueType.STRING, "INT": gguf.GGUFValueType.UINT32}[kinds[constant]]
    assert entries["quantize.imatrix.dataset"].endswith(b"\0" + b"a" * 127)  # its buffer has 128 bytes
