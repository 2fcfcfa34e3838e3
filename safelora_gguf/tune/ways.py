"""How candidates become adapters that llama.cpp can load."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from converters.adapters.output import Fact
from safelora_gguf.report import OutputReport, ProjectReport
from safelora_gguf.setting import Operator, Setting

Origin = Literal["projection", "repair", "scaling"]


class Scored(Protocol):
    """A scored adapter, as far as a grid must know it; see `candidates.ScoredAdapter`."""

    @property
    def total(self) -> int: ...

    def chosen(self, setting: Setting) -> Collection[str]: ...

    def key(self, setting: Setting) -> Hashable: ...

    def cosines(self, operator: Operator, rank: int | None) -> Mapping[str, float | None]: ...

    def norm_ratio(self, setting: Setting) -> float | None: ...

    def write(
        self,
        setting: Setting,
        target: Path,
        *,
        outtype: str,
        to: Literal["gguf", "peft"] | None = None,
        force: bool = False,
        facts: Mapping[str, Fact] | None = None,
    ) -> ProjectReport: ...

    def write_random(self, setting: Setting, target: Path, *, outtype: str) -> ProjectReport: ...


class Described(Protocol):
    """What makes a candidate, in words and as data; see `setting.Setting`."""

    @property
    def name(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


class Written(Protocol):
    """What is told of an adapter that was written, in the form that its own command tells it."""

    @property
    def output(self) -> OutputReport | None: ...

    def to_json(self) -> dict[str, Any]: ...


class Write(Protocol):
    """Makes an adapter; see `candidates.ScoredAdapter.write`."""

    def __call__(
        self,
        target: Path,
        *,
        to: Literal["gguf", "peft"] | None = None,
        force: bool = False,
        facts: Mapping[str, Fact] | None = None,
    ) -> Written: ...


@dataclass(frozen=True)
class Command:
    """A command of ours that makes a candidate.

    Attributes:
        roles: of the inputs that it takes, each as an option of that name.
        options: the rest, without the output.
        exact: whether it makes the same adapter; else one like it, calibrated otherwise.
    """

    name: str
    roles: tuple[str, ...]
    options: tuple[str, ...]
    exact: bool = True

    def line(self, paths: Mapping[str, str], out: str) -> str:
        """As it is typed.

        Args:
            paths: of the inputs, by role.
        """
        inputs = [word for role in self.roles for word in (f"--{role}", paths[role])]
        return shlex.join(["safelora-gguf", self.name, *inputs, *self.options, "--out", out])


@dataclass(frozen=True)
class Way:
    """How a candidate becomes an adapter that llama.cpp can load.

    Attributes:
        setting: what reports say of it.
        command: makes it, too; None where only a scale at run time does.
        scale: of the untouched adapter at run time, if that is all that it takes; else it is written.
        modules: how many are projected or repaired, each by itself.
        norm_ratio: its total norm over the untouched adapter's; None where that is not known before it is written.
        write: makes it.
        draft: makes it for no more than being measured.
        control: makes the same with a random subspace; None where no subspace is involved.
    """

    origin: Origin
    setting: Mapping[str, Any]
    command: Command | None
    scale: float | None
    modules: int
    norm_ratio: float | None
    write: Write
    draft: Callable[[Path], object]
    control: Callable[[Path], object] | None


def way_of(setting: Setting, scored: Scored, outtype: str) -> Way:
    """How a setting's adapter is made."""
    scales = setting.operator == "scale"

    def write(
        target: Path,
        *,
        to: Literal["gguf", "peft"] | None = None,
        force: bool = False,
        facts: Mapping[str, Fact] | None = None,
    ) -> ProjectReport:
        return scored.write(setting, target, outtype=outtype, to=to, force=force, facts=facts)

    def control(target: Path) -> ProjectReport:
        return scored.write_random(setting, target, outtype=outtype)

    return Way(
        origin="scaling" if scales else "projection",
        setting=setting.to_json(),
        command=None if scales else Command("project", ("base", "aligned", "adapter"), _options(setting)),
        scale=setting.scale if scales else None,
        modules=len(scored.chosen(setting)),
        norm_ratio=scored.norm_ratio(setting),
        write=write,
        draft=write,
        control=None if scales else control,
    )


def _options(setting: Setting) -> tuple[str, ...]:
    """A projection as options of `project`."""
    rank = () if setting.rank is None else ("--rank", str(setting.rank))
    rule = setting.selection
    chosen = ("--all",) if rule.value is None else (f"--{rule.mode}", f"{rule.value:.10g}")
    strength = () if setting.strength == 1 else ("--strength", f"{setting.strength:.10g}")
    return ("--operator", setting.operator, *rank, *chosen, *strength)
