"""Architectures: how a family's Hugging Face tensors become llama.cpp's, and back.

One module per family, each a table entry; nothing here branches on a family's name. To add one, write its
`Architecture` and list it in `registry`.
"""

from converters.architectures.heads import NO_HEADS, HeadCounts
from converters.architectures.registry import KNOWN, architecture_of, find_architecture
from converters.architectures.table import Architecture, Destination, Rule

__all__ = [
    "KNOWN",
    "NO_HEADS",
    "Architecture",
    "Destination",
    "HeadCounts",
    "Rule",
    "architecture_of",
    "find_architecture",
]
