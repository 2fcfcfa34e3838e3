"""Upstream's keys and generated tensors for configurations, each that of a model without tensors.

    python model_keys_child.py LLAMA_CPP < CONFIGURATIONS

CONFIGURATIONS is a JSON list of what config.json holds; the answer is a JSON list of the same length. Keys and tensors
are in hexadecimal, as bytes of the file.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def written(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    import conversion
    import gguf

    (directory / "config.json").write_text(json.dumps(config))
    settings = conversion.ModelBase.load_hparams(directory, False)
    found = conversion.get_model_class(conversion.get_model_architecture(settings, conversion.ModelType.TEXT))
    model = found(directory, gguf.LlamaFileType.ALL_F32, directory / "model.gguf")
    tensors = {name: tensor.numpy().tobytes().hex() for name, tensor in model.generate_extra_tensors()}
    model.set_gguf_parameters()
    writer = model.gguf_writer
    keys = {
        key: bytes(writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)).hex()
        for key, value in writer.kv_data[0].items()
    }
    return {"keys": keys, "tensors": tensors}


def answer(config: dict[str, Any]) -> dict[str, Any]:
    with TemporaryDirectory() as directory:
        try:
            return written(config, Path(directory))
        except Exception as error:  # told to who asked
            return {"error": repr(error)}


def main(llama_cpp: Path) -> None:
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    logging.disable(logging.CRITICAL)
    sys.stdout.write(json.dumps([answer(config) for config in json.load(sys.stdin)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
