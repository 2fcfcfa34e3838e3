"""PEFT's pairs on bare parameters (target_parameters): which parameter a pair belongs to, and how its experts lie.

A parameter of a mixture of experts has E matrices and one pair of tensors for all of them (PEFT's ParamWrapper):

    dW[e] = scaling * B[:, :, e] @ A[e],  with A (E*r, in) as (E, r, in) and B (out, r*E) as (out, r, E)

The parameters of one module share its name in the file: each further one wraps the one before, so that the first
in order of definition is innermost (experts.base_layer.lora_A) and the last outermost (experts.lora_A).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from converters.adapters.gguf_pairs import MAX_EXPERTS
from converters.errors import FormatError, InputError, UnsupportedError
from converters.names import named

_WRAPPED = ".base_layer"
_DEEPEST = 32  # names in one name, dots between them, that are compared
_EXPERTS = ("experts", "experts.mlp")
"""What transformers calls modules whose parameters are stacks of experts, where only the parameter is named."""

_ORDERS = (
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "v1", "w2"),
)
"""The order in which transformers' classes define the parameters of one module."""

Tell = Callable[[InputError], None]
"""What is done about a part that can't be used: whoever collects instead of raising leaves it out and goes on."""


def stop(error: InputError) -> None:
    """Raises it: the first defect is the last."""
    raise error


def parameters_behind(
    modules: Iterable[str], targets: Sequence[str], path: Path, tell: Tell = stop
) -> dict[str, str | None]:
    """The full name of the parameter that a pair belongs to, by the module's name in the file.

    Args:
        modules: all that have pairs, as the file calls them.
        targets: target_parameters: names, or their ends behind a dot, in no order.

    Returns:
        None for a module whose own weight has the pair. Those that were told of are left out.

    Raises:
        FormatError: a module has other pairs than the targets say.
        UnsupportedError: which pair belongs to which parameter can't be told.
    """
    known = _by_module(targets, path, tell)
    wrappers: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        wrappers[_unwrapped(module)].append(module)
    found: dict[str, str | None] = {}
    for module, wrapping in wrappers.items():
        try:
            found.update(_behind(module, wrapping, known, path))
        except InputError as error:
            tell(error)
    return found


def _behind(
    module: str, wrapping: Sequence[str], known: Mapping[str, set[str]], path: Path
) -> Mapping[str, str | None]:
    """`parameters_behind` for all pairs of one module."""
    names = _named(module, known, nested=wrapping != [module])
    if names:
        innermost_first = sorted(wrapping, key=len, reverse=True)
        ordered = _in_order(module, names, innermost_first, path)
        return {wrapper: f"{module}.{name}" for wrapper, name in zip(innermost_first, ordered, strict=True)}
    if wrapping != [module]:
        told = "is a pair on a bare parameter, and target_parameters names none of its module's"
        raise FormatError(told, file=path, tensor=wrapping[0])
    return {module: None}


def count_experts(rows: int, rank: int, path: Path, tensor: str) -> int:
    """How many matrices a pair describes whose A has so many rows.

    Raises:
        FormatError: not a whole number of them, or more than any model has.
    """
    if rows % rank:
        raise FormatError(
            f"has {rows} rows, which are no multiple of the rank {rank} that adapter_config.json gives each expert: "
            f"they do not belong together",
            file=path,
            tensor=tensor,
        )
    if rows // rank > MAX_EXPERTS:
        told = f"would be a stack of {rows // rank} experts; at most {MAX_EXPERTS} are read"
        raise FormatError(told, file=path, tensor=tensor)
    return rows // rank


def notes_on_targets(targets: Sequence[str], parameters: Iterable[str]) -> tuple[str, ...]:
    """A sentence about the targets that none of the adapted parameters (full names) is."""
    wanted = set(targets)
    met = {end for parameter in parameters for end in _ends(parameter) if end in wanted}
    absent = [target for target in targets if target not in met]
    if not absent:
        return ()
    return (f"there is no pair for what target_parameters names: {named(absent)}",)


def _by_module(targets: Sequence[str], path: Path, tell: Tell) -> dict[str, set[str]]:
    """Parameters' own names by the end of the module's name that stands before them."""
    known: dict[str, set[str]] = defaultdict(set)
    for target in targets:
        module, _, name = target.rpartition(".")
        if module.count(".") >= _DEEPEST or not name:
            tell(FormatError(f"target_parameters: {target[:80]!r} is no parameter's name", file=path))
        else:
            known[module].add(name)
    return known


def _unwrapped(module: str) -> str:
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module


def _named(module: str, known: Mapping[str, set[str]], *, nested: bool) -> set[str]:
    """The parameters of a module that are targets."""
    if not known:
        return set()
    bare = known.get("", set())
    if not nested and not module.endswith(_EXPERTS):
        bare = bare & {"weight"}  # else this is an ordinary module, and it is others that have such a parameter
    return bare.union(*(known.get(end, ()) for end in _ends(module)))


def _ends(name: str) -> Iterator[str]:
    """A name and what follows each of its last dots."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(max(0, len(parts) - _DEEPEST - 1), len(parts)))


def _in_order(module: str, names: set[str], wrapping: Sequence[str], path: Path) -> Sequence[str]:
    """The names of a module's parameters, innermost first."""
    if [len(wrapper) for wrapper in wrapping] != [
        len(module) + depth * len(_WRAPPED) for depth in reversed(range(len(names)))
    ]:
        raise FormatError(
            f"{module} has {len(wrapping)} of the nested pairs of parameters, and target_parameters names "
            f"{', '.join(sorted(names))[:200]}: they do not belong together",
            file=path,
        )
    if len(names) == 1:
        return list(names)
    order = next((order for order in _ORDERS if names <= set(order)), None)
    if order is None:
        raise UnsupportedError(
            f"{module} has pairs for {', '.join(sorted(names))[:200]}, and which pair is whose can't be told: the file "
            f"only says in which order the module defines them. Merge the adapter into its model (PEFT's "
            f"merge_and_unload)",
            file=path,
        )
    return [name for name in order if name in names]
