"""All table entries, and how one is found."""

from converters.architectures.cohere import COHERE2, COMMAND_R
from converters.architectures.deepseek import DEEPSEEK2
from converters.architectures.falcon import FALCON
from converters.architectures.gemma import GEMMA, GEMMA2, GEMMA3
from converters.architectures.glm import GLM4
from converters.architectures.gpt_oss import GPT_OSS
from converters.architectures.llama import GRANITE, GRANITE_MOE, LLAMA, MISTRAL3, SMOLLM3
from converters.architectures.olmo import OLMO2
from converters.architectures.phi import PHI3
from converters.architectures.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from converters.architectures.stablelm import STABLELM
from converters.architectures.table import Architecture
from converters.errors import UnsupportedError

KNOWN: tuple[Architecture, ...] = (
    LLAMA,
    MISTRAL3,
    SMOLLM3,
    GRANITE,
    GRANITE_MOE,
    QWEN2,
    QWEN3,
    QWEN2_MOE,
    QWEN3_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    COMMAND_R,
    COHERE2,
    STABLELM,
    GLM4,
    FALCON,
    GPT_OSS,
    DEEPSEEK2,
)

_BY_NAME = {name: entry for entry in KNOWN for name in (entry.name, *entry.classes)}


def find_architecture(name: str) -> Architecture | None:
    """The table entry for a class named in config.json, or for GGUF's name of an architecture."""
    return _BY_NAME.get(name)


def architecture_of(name: str, remedy: str) -> Architecture:
    """Like `find_architecture`.

    Args:
        remedy: what else the user can do; ends the message.

    Raises:
        UnsupportedError: there is none.
    """
    found = find_architecture(name)
    if found is not None:
        return found
    raise UnsupportedError(
        f"the architecture {name} has no table between Hugging Face's layout and GGUF's yet; known are "
        f"{', '.join(sorted(_BY_NAME))}. {remedy}"
    )
