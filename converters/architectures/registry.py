"""All table entries, and how one is found."""

from converters.architectures.llama import LLAMA
from converters.architectures.qwen import QWEN2, QWEN3
from converters.architectures.table import Architecture
from converters.errors import UnsupportedError

KNOWN: tuple[Architecture, ...] = (LLAMA, QWEN2, QWEN3)

_BY_CLASS = {name: architecture for architecture in KNOWN for name in architecture.classes}


def architecture_of(class_name: str) -> Architecture:
    """The table entry for a class named in config.json.

    Raises:
        UnsupportedError: there is none.
    """
    if class_name in _BY_CLASS:
        return _BY_CLASS[class_name]
    raise UnsupportedError(
        f"the architecture {class_name} has no table for GGUF yet; known are {', '.join(sorted(_BY_CLASS))}. "
        f"Writing a PEFT directory (an --out that does not end in .gguf) works for any architecture"
    )
