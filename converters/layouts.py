"""One layout per run: Hugging Face's or GGUF's tensor names and row order.

Inputs of one format are used as they are, so that no architecture needs a table. As soon as they mix, whatever is in
Hugging Face's layout is seen through the architecture's table as GGUF (see `converters.converted_model` and
`converters.adapters.converted`). So are adapters of a mixture's experts, which have several names and shapes there.
"""

from __future__ import annotations

from converters.adapters.converted import ConvertedAdapter, needs_table
from converters.adapters.lora import LoraAdapter
from converters.architectures import Architecture, HeadCounts, architecture_of, find_architecture
from converters.bridge import Bridge
from converters.converted_model import ConvertedModel
from converters.errors import Error, MismatchError
from converters.models import Model, ModelDescription


def common_layout(
    base: Model, aligned: Model, adapter: LoraAdapter, *, to_gguf: bool
) -> tuple[Model, Model, LoraAdapter]:
    """The three in one layout: untouched where they share one, in GGUF's otherwise.

    Args:
        to_gguf: whether the adapter will be written as GGUF.

    Raises:
        UnsupportedError: formats mix, and the architecture has no table, or no place for a module.
        MismatchError: they are of different architectures, or their heads differ.
        FormatError: the heads can't be told.
    """
    alike = len({base.layout, aligned.layout, adapter.layout}) == 1
    if alike and not needs_table(adapter, find_table(aligned), to_gguf=to_gguf):
        return base, aligned, adapter
    bridge = _bridge(base, aligned, _remedy(base, aligned, adapter))
    return _seen(base, bridge), _seen(aligned, bridge), _seen_adapter(adapter, bridge)


def common_models(base: Model, aligned: Model, *, in_gguf: bool) -> tuple[Model, Model]:
    """Two models in one layout.

    Args:
        in_gguf: whether it should be GGUF's where the architecture has a table; where formats mix it is anyway.

    Raises: see `common_layout`.
    """
    if base.layout == aligned.layout and not (in_gguf and base.layout != "gguf" and find_table(aligned)):
        return base, aligned
    bridge = _bridge(base, aligned, _remedy(base, aligned, None))
    return _seen(base, bridge), _seen(aligned, bridge)


def _bridge(base: Model, aligned: Model, remedy: str) -> Bridge:
    tables = [table_of(model, remedy) for model in (base, aligned)]
    if tables[0] != tables[1]:
        raise MismatchError(
            f"is a {aligned.architecture}, and the base {base.path} is a {base.architecture}: base and aligned must be "
            f"the same model before and after its alignment",
            file=aligned.path,
        )
    check_heads(base, aligned)
    return Bridge.of(tables[1], aligned)


def gguf_layout(adapter: LoraAdapter, model: ModelDescription) -> LoraAdapter:
    """The adapter as GGUF has it, for a model that is GGUF.

    Raises:
        UnsupportedError: the architecture has no table, or no place for a module.
        MismatchError: experts that the model hasn't. FormatError: the heads can't be told.
    """
    if adapter.layout == "gguf":
        return adapter
    remedy = f"A GGUF adapter needs none: convert {adapter.path} with llama.cpp's convert_lora_to_gguf.py"
    return ConvertedAdapter(adapter, Bridge.of(table_of(model, remedy), model))


def written_layout(adapter: LoraAdapter, model: ModelDescription, *, to_gguf: bool) -> LoraAdapter:
    """The adapter as GGUF would have it if it is for experts of a mixture; otherwise as it is.

    Args:
        to_gguf: whether it will be written as GGUF.

    Raises:
        UnsupportedError: the architecture has no table, or no place for a module.
        MismatchError: experts that the model hasn't. FormatError: the heads can't be told.
    """
    if not needs_table(adapter, find_table(model), to_gguf=to_gguf):
        return adapter
    remedy = "Adapters that have a module for every expert can be written as PEFT directories for any architecture"
    return ConvertedAdapter(adapter, Bridge.of(table_of(model, remedy), model))


def check_heads(base: Model, aligned: Model) -> None:
    """That two models have the same heads: others mean another order of rows, whose difference means nothing.

    Raises:
        MismatchError: they differ. FormatError: one can't be told.
    """
    heads = base.heads(), aligned.heads()
    if heads[0] != heads[1]:
        raise MismatchError(
            f"has {_told(heads[1])}, and the base {base.path} has {_told(heads[0])}: base and aligned must be the same "
            f"model before and after its alignment",
            file=aligned.described_by,
        )


def find_table(model: ModelDescription) -> Architecture | None:
    """The table of a model's architecture, where there is one."""
    return find_architecture(model.architecture)


def _told(heads: HeadCounts) -> str:
    return f"{heads.query} attention heads ({heads.key_value} for keys and values)"


def table_of(model: ModelDescription, remedy: str) -> Architecture:
    """The table of a model's architecture.

    Args:
        remedy: what else the user can do; ends the message.

    Raises:
        UnsupportedError: there is none. FormatError: the model names no architecture.
    """
    try:
        return architecture_of(model.architecture, remedy)
    except Error as error:
        raise type(error)(error.message, file=model.described_by) from None


def _remedy(base: Model, aligned: Model, adapter: LoraAdapter | None) -> str:
    """Which conversion would make all inputs GGUF, for which no table is needed."""
    table = next((found for model in (base, aligned) if (found := find_table(model))), None)
    steps: dict[str, list[str]] = {}
    for model in (base, aligned):
        if model.layout != "gguf":
            steps.setdefault(_converter_of(model), []).append(str(model.path))
    told = [f"{' and '.join(paths)} with {tool}" for tool, paths in steps.items()]
    if adapter is not None and adapter.layout != "gguf":
        tool = "safelora-gguf convert adapter" if table else "llama.cpp's convert_lora_to_gguf.py"
        told.append(f"{adapter.path} with {tool}")
    return f"Files that are all GGUF need none: convert {', '.join(told)}"


def _converter_of(model: ModelDescription) -> str:
    table = find_table(model)
    ours = table is not None and table.writing is not None
    return "safelora-gguf convert model" if ours else "llama.cpp's convert_hf_to_gguf.py"


def _seen(model: Model, bridge: Bridge) -> Model:
    return model if model.layout == "gguf" else ConvertedModel(model, bridge)


def _seen_adapter(adapter: LoraAdapter, bridge: Bridge) -> LoraAdapter:
    return adapter if adapter.layout == "gguf" else ConvertedAdapter(adapter, bridge)
