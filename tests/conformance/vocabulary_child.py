"""Has upstream's converter write the vocabularies of directories, each to a GGUF file of its own.

    python vocabulary_child.py LLAMA_CPP < JOBS

JOBS is a JSON list of [directory, pre-tokenizer, file]. Upstream finds a pre-tokenizer's name by a hash of published
vocabularies, so that it has none for a small one; it is given the name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def write(directory: Path, pre: str, out: Path) -> None:
    """The vocabulary as the class in config.json writes it, and nothing else."""
    import conversion
    import gguf

    config = json.loads((directory / "config.json").read_text())
    found = conversion.get_model_class(config["architectures"][0])
    model = found.__new__(found)
    model.dir_model = directory
    model.hparams = {**config, **config.get("text_config", {})}
    model.hf_arch = model.origin_hf_arch = config["architectures"][0]
    model.is_mistral_format = False
    model.get_vocab_base_pre = lambda tokenizer: pre
    model.gguf_writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[found.model_arch])
    model.set_vocab()
    model.gguf_writer.write_header_to_file(out)
    model.gguf_writer.write_kv_data_to_file()
    model.gguf_writer.close()


def main(llama_cpp: Path) -> None:
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    for directory, pre, out in json.load(sys.stdin):
        write(Path(directory), pre, Path(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
