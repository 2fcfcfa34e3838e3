"""Sliding windows that llama.cpp leaves out: its graphs of some families let every token see all that came before it.

Their files have no key for one that anything reads (src/models of llama.cpp; `phi3` reads its own, and switches it
off). So the setting is a loss: up to the window's length a text gives the same logits, beyond it others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from converters.architectures.hyperparameters import MOST_POSITIONS, layers
from converters.architectures.writing import Losses
from converters.config_reader import ConfigReader

WINDOW, USED = "sliding_window", "use_sliding_window"
_SLIDES = "sliding_attention"


def window_in_all(config: ConfigReader) -> Iterator[str]:
    """Of a family whose layers all have the window, wherever it is set."""
    yield from _left_out(config, layers(config))


def window_in_all_where_used(config: ConfigReader) -> Iterator[str]:
    """The same with a switch: Qwen 3's mixtures."""
    if config.flag(USED, default=False):
        yield from window_in_all(config)


def window_where_used(slides: Callable[[ConfigReader, int], bool]) -> Losses:
    """Of a family with a switch whose layers have the window by layer_types, or else by a rule.

    Args:
        slides: the rule, for a layer counted from 0.
    """

    def losses(config: ConfigReader) -> Iterator[str]:
        if not config.flag(USED, default=False):
            return
        kinds, count = config.find("layer_types"), layers(config)
        if kinds is None:
            yield from _left_out(config, sum(slides(config, layer) for layer in range(count)))
        elif isinstance(kinds, list):
            yield from _left_out(config, kinds[:count].count(_SLIDES))
        else:
            raise config.wrong("layer_types", f"a list of {count} words")

    return losses


def in_later_layers(config: ConfigReader, layer: int) -> bool:
    """Qwen 2 and 3: the first max_window_layers see everything."""
    return layer >= config.count("max_window_layers", least=0)


def in_every_other_layer(config: ConfigReader, layer: int) -> bool:
    """Qwen 2's mixtures."""
    return layer % 2 == 0 and layer < config.count("max_window_layers", least=0)


def in_every_fourth_layer(_: ConfigReader, layer: int) -> bool:
    """SmolLM 3: those that rotate nothing."""
    return layer % 4 == 3


def _left_out(config: ConfigReader, sliding: int) -> Iterator[str]:
    """A sentence, if `sliding` layers have a window that a text within the context is longer than."""
    if not sliding or not config.has(WINDOW):
        return
    window = config.count(WINDOW, least=0, most=MOST_POSITIONS)
    if 0 < window < config.count("max_position_embeddings", most=MOST_POSITIONS):
        yield (
            f"left out: the sliding window of {window} tokens ({WINDOW}, in {sliding} of {layers(config)} layers): "
            f"llama.cpp knows none for this architecture, so that the output is another than transformers' from token "
            f"{window + 1} of a text on, and the same before"
        )
