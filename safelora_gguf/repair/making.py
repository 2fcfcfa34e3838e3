"""Repaired versions of one adapter: read once in llama.cpp, solved for as many mu as are asked, written for llama.cpp.

Whoever looks for a mu needs no more than this: `tune` and `repair` share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.output import LoadPair, Origin
from converters.adapters.plan import plan_output
from converters.errors import UnsupportedError
from safelora_gguf.device import resolve_device
from safelora_gguf.repair.inputs import RepairInputs
from safelora_gguf.repair.modules import delta_norm, ratio_of_norms
from safelora_gguf.repair.reading.capturing import TASK_SHARE, Asked, CapturedSets, capture_sets
from safelora_gguf.repair.reading.folds import deal
from safelora_gguf.repair.writing import original_pairs, repaired_pairs
from safelora_gguf.smoke.judging import KEYWORD
from safelora_gguf.smoke.parent.session import Session, ask
from safelora_gguf.smoke.prompts import Prompt, PromptSet
from safelora_gguf.smoke.protocol import AdapterChoice, InputShape

if TYPE_CHECKING:
    from safelora_gguf.repair.solving.pair_store import PairStore
    from safelora_gguf.repair.solving.solver import ModuleFigures, Solver

FOLDS = 3

Tell = Callable[[int, int, str], None]
"""Called with what is done of a step, how much there is of it, and what it is."""


@dataclass(frozen=True)
class Method:
    """How an adapter is repaired.

    Attributes:
        eps: of the ridge, relative to the mean diagonal of the benign inputs' second moment.
        tokens: read of each set, at most.
        tail: tokens of a harmful prompt, before its answer, from which on inputs are read.
        task_share: of the benign inputs' second moment, what task prompts make where there are others, too.
        seed: which tokens.
        outtype: of the adapters that are written.
        device: where it is solved.
    """

    eps: float = 0.1
    tokens: int = 2048
    tail: int = 9
    seed: int = 0
    outtype: str = "f32"
    device: str = "auto"
    task_share: float = TASK_SHARE


def deal_folds(prompts: Sequence[Prompt], count: int = FOLDS) -> tuple[int, ...]:
    """The fold of each prompt: as `deal` has it, but tasks one by one. A category that is left out stands for what was
    not foreseen, and an adapter's own task is foreseen."""
    return deal([replace(prompt, category=None) if prompt.kind == "task" else prompt for prompt in prompts], count)


@dataclass
class Repairs:
    """Repaired versions of one adapter. Nothing is read before the first of them is asked for, and then once.

    Attributes:
        session: of the aligned model.
        untouched: the adapter as GGUF.
        prompts: those that calibrate, harmful ones and others.
        scratch: a directory for adapters, which its owner removes.
        roomy: the same for captured inputs and solutions; None: `scratch`, too.
        refused: the harmful prompts that the aligned model refuses; None: it is asked.
        folds: the fold of each of `prompts`; empty where none is ever left out.
        tell: progress of reading and solving.
    """

    session: Session
    inputs: RepairInputs
    untouched: Path
    prompts: PromptSet
    method: Method
    scratch: Path
    refused: Sequence[Prompt] | None = None
    folds: Sequence[int] = ()
    tell: Tell | None = None
    roomy: Path | None = None
    _captured: CapturedSets | None = field(default=None, repr=False)
    _solved: tuple[Solver, PairStore] | None = field(default=None, repr=False)

    def read(self) -> CapturedSets:
        """Has the model read what it needs to, unless it has; raises as `solve`."""
        return self._captured if self._captured is not None else self._capture()

    @property
    def captured(self) -> CapturedSets | None:
        """What was read, once anything was."""
        return self._captured

    def adapter(self, mu: float, fold: int | None = None) -> Path:
        """The repaired adapter as GGUF in `scratch`, under a name of its own; the caller may delete it.

        Args:
            fold: solved without the prompts of this fold; None: with all.

        Raises: as `solve`, and
            UnsupportedError: values that don't fit the type.
        """
        place = "" if fold is None else f"-without-{fold}"
        file = self.scratch / f"repair-mu-{mu:.10g}{place}.gguf"
        self.write(file, self.pairs(mu, fold))
        return file

    def pairs(self, mu: float, fold: int | None = None) -> LoadPair:
        """A' and B of a module, solved if they aren't yet; raises as `solve`."""
        self.solve([mu], [fold])
        store = self._solver()[1]
        return repaired_pairs(self.inputs, lambda module: store.get(module, mu, fold))

    def solve(self, mus: Sequence[float], folds: Sequence[int | None] = (None,)) -> None:
        """Solves for several at once, which takes less time than one after another; what is known is kept.

        Raises:
            UnsupportedError: the aligned model refuses none of the harmful prompts; or see `capture_sets`.
            LlamaError, MissingLlamaError, WriteError: see `capture_sets`.
        """
        self._solver()[0].solve(mus, folds, tell=self.tell)

    def figures(self, mu: float) -> dict[str, ModuleFigures]:
        """What each module keeps at this mu, by name; raises as `solve`."""
        return {one.module: one for one in self._solver()[0].figures(mu, tell=self.tell)}

    def write(self, file: Path, load: LoadPair) -> None:
        """Pairs as a GGUF adapter for llama.cpp, rounded as the output will be."""
        write_measured(self.inputs, file, load, self.method.outtype)

    def _solver(self) -> tuple[Solver, PairStore]:
        from safelora_gguf.repair.solving.pair_store import PairStore
        from safelora_gguf.repair.solving.solver import Solver

        if self._solved is None:
            place = (self.roomy or self.scratch) / "solved"
            place.mkdir()
            store, device = PairStore(place), resolve_device(self.method.device)
            solver = Solver(self.read(), self.inputs.adapter, store, eps=self.method.eps, device=device)
            self._solved = solver, store
        return self._solved

    def _capture(self) -> CapturedSets:
        refused = self._refused()
        if not refused:
            told = "refuses none of the harmful prompts that calibrate a repair: there is nothing to bring back"
            raise UnsupportedError(told, file=self.session.file)
        place = (self.roomy or self.scratch) / "captured"
        place.mkdir()
        others = [prompt for prompt in self.prompts.prompts if prompt.kind != "harmful"]
        self._captured = capture_sets(
            self.session,
            self._asked(refused),
            self._asked(others),
            AdapterChoice(str(self.untouched)),
            self._shapes(),
            scratch=place,
            tokens=self.method.tokens,
            tail=self.method.tail,
            seed=self.method.seed,
            task_share=self.method.task_share,
            progress=self.tell,
        )
        return self._captured

    def _shapes(self) -> dict[str, InputShape]:
        """What the adapted weights are multiplied with; stacks of experts have three dimensions."""
        stacks = {weight: self.inputs.model.infos[weight].shape[:-2] for weight in self.inputs.weights}
        return {one: InputShape(self.inputs.widths[one], stack[0] if stack else 0) for one, stack in stacks.items()}

    def _asked(self, prompts: Sequence[Prompt]) -> Asked:
        folds = dict(zip((prompt.id for prompt in self.prompts.prompts), self.folds, strict=False))
        return Asked(
            tuple(ask(one.prompt) for one in prompts),
            tuple(folds.get(one.id, 0) for one in prompts),
            tuple(one.kind == "task" for one in prompts),
        )

    def _refused(self) -> Sequence[Prompt]:
        """Raises whatever llama.cpp failed on."""
        if self.refused is None:
            harmful = [prompt for prompt in self.prompts.prompts if prompt.kind == "harmful"]
            found = self.session.answers((), [ask(prompt.prompt) for prompt in harmful])
            if found.failure is not None:
                raise found.failure
            pairs = zip(harmful, found.answers, strict=True)
            self.refused = [one for one, answer in pairs if answer is not None and KEYWORD.decide(answer) is True]
        return self.refused


def write_measured(inputs: RepairInputs, file: Path, load: LoadPair, outtype: str) -> None:
    """Pairs as a GGUF adapter that is only measured; one that is there is replaced.

    Raises:
        UnsupportedError: values that don't fit the type. WriteError: the disk is full or fails.
    """
    output = plan_output(file, inputs.adapter, inputs.model, outtype=outtype, to="gguf", label="", force=True)
    output.write(load, Origin("", "An adapter that is only measured.", ("lora", "safelora-gguf"), {}))


def norm_ratio(inputs: RepairInputs, load: LoadPair) -> float | None:
    """`ratio_of_norms` of an adapter's changed pairs and its own; None for an adapter that changes nothing."""
    original = original_pairs(inputs)
    return ratio_of_norms(
        [
            (delta_norm(inputs, module, *original(module)), delta_norm(inputs, module, *load(module)))
            for module in inputs.adapter.pairs
        ]
    )
