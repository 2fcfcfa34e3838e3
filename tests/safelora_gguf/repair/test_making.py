"""What is read and solved for the repaired versions of one adapter.

Oracle: what the capture was asked for, against the prompts by hand; a norm of dense float64 matrices; the adapter's own
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.errors import LlamaError, UnsupportedError
from safelora_gguf.repair import making
from safelora_gguf.repair.inputs import RepairInputs, open_repair_inputs
from safelora_gguf.repair.making import Method, Repairs, deal_folds, norm_ratio, write_measured
from safelora_gguf.repair.reading.capturing import Asked
from safelora_gguf.repair.writing import original_pairs
from safelora_gguf.smoke.parent.outcomes import Answered
from safelora_gguf.smoke.parent.session import ask
from safelora_gguf.smoke.prompts import Kind, Prompt, PromptSet
from safelora_gguf.smoke.protocol import AdapterChoice, Answer, Chat

FAMILY = Path(__file__).parents[3] / "safelora_gguf" / "tiny_family"
KINDS: tuple[Kind, ...] = ("harmful", "benign", "task", "harmful", "borderline", "harmful", "task")
PROMPTS = tuple(Prompt(str(place), kind, f"{kind} {place}", f"{kind} {place % 2}") for place, kind in enumerate(KINDS))
FOLDS = (0, 1, 2, 1, 0, 2, 1)


class FakeSession:
    """Refuses what it is told to, and remembers what it was asked."""

    file = "model.gguf"

    def __init__(self, refuses: Callable[[str], bool], failure: LlamaError | None = None) -> None:
        self.refuses, self.failure = refuses, failure
        self.asked: list[str] = []

    def answers(self, adapters: Sequence[AdapterChoice], chats: Sequence[Chat]) -> Answered:
        assert not adapters
        self.asked += [chat[0]["content"] for chat in chats]
        said = [Answer("I'm sorry, but I can't help with that." if self.refuses(chat[0]["content"]) else "Of course: a")
                for chat in chats]  # fmt: skip
        return Answered(tuple(said), self.failure)


@pytest.fixture(scope="module")
def inputs() -> RepairInputs:
    return open_repair_inputs(FAMILY / "aligned.gguf", FAMILY / "adapter")


def repairs(inputs: RepairInputs, tmp_path: Path, session: FakeSession, **more: Any) -> Repairs:
    prompts = PromptSet("mine", "1", PROMPTS)
    return Repairs(session, inputs, tmp_path / "adapter.gguf", prompts, Method(tail=5), tmp_path, folds=FOLDS, **more)  # type: ignore[arg-type]


def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is to be captured, once anything is."""
    found: list[tuple[Any, ...]] = []

    def fake(*given: Any, **options: Any) -> str:
        found.append((*given[1:], options))
        return "captured"

    monkeypatch.setattr(making, "capture_sets", fake)
    return found


def test_refused_harmful_prompts_are_read_and_all_others_each_with_its_fold(
    inputs: RepairInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, session = captured(monkeypatch), FakeSession(lambda text: text.startswith("harmful") and text[-1] != "5")
    own = repairs(inputs, tmp_path, session)
    assert own.captured is None
    own.read()
    own.read()
    ((harmful, others, adapter, weights, options),) = asked
    assert session.asked == ["harmful 0", "harmful 3", "harmful 5"]
    assert harmful == Asked((ask("harmful 0"), ask("harmful 3")), (0, 1), (False, False))
    assert others == Asked(
        tuple(ask(PROMPTS[place].prompt) for place in (1, 2, 4, 6)),
        (1, 2, 0, 1),
        tuple(PROMPTS[place].kind == "task" for place in (1, 2, 4, 6)),
    )
    assert adapter == AdapterChoice(str(tmp_path / "adapter.gguf"))
    assert tuple(weights) == inputs.weights
    assert (options["tail"], options["tokens"], options["seed"]) == (5, 2048, 0)
    assert options["task_share"] == 0.8
    assert options["scratch"].parent == tmp_path


def test_what_is_known_to_be_refused_is_not_asked_again(
    inputs: RepairInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, session = captured(monkeypatch), FakeSession(lambda _: False)
    repairs(inputs, tmp_path, session, refused=PROMPTS[3:4]).read()
    assert session.asked == []
    assert asked[0][0].chats == (ask("harmful 3"),)


def test_where_nothing_is_refused_or_llama_cpp_fails_nothing_is_read(
    inputs: RepairInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = captured(monkeypatch)
    with pytest.raises(UnsupportedError, match="refuses none of the harmful prompts"):
        repairs(inputs, tmp_path, FakeSession(lambda _: False)).read()
    with pytest.raises(LlamaError, match="crashed"):
        repairs(inputs, tmp_path, FakeSession(lambda _: True, LlamaError("crashed"))).read()
    assert asked == []


def test_tasks_of_one_category_are_dealt_out_and_others_stay_together() -> None:
    prompts = [Prompt(f"t{n}", "task", f"t{n}", "mine") for n in range(6)]
    prompts += [Prompt(f"h{n}", "harmful", f"h{n}", "abc"[n % 3]) for n in range(6)]
    prompts += [Prompt(f"b{n}", "benign", f"b{n}", "xyz"[n % 3]) for n in range(6)]
    folds = deal_folds(prompts)
    assert set(folds) == {0, 1, 2}
    assert sorted(folds[:6]) == [0, 0, 1, 1, 2, 2]
    assert folds[6:9] == folds[9:12] and len(set(folds[6:9])) == 3


def test_the_norm_ratio_is_that_of_the_dense_updates(inputs: RepairInputs) -> None:
    """Every A times another number, so that no single factor is the answer."""
    load = original_pairs(inputs)
    factors = {module: 0.25 + place % 4 for place, module in enumerate(inputs.adapter.pairs)}
    before = after = 0.0
    for module, pair in inputs.adapter.pairs.items():
        a, b = (half.double() for half in load(module))
        norm = float(torch.linalg.matrix_norm(pair.scaling * b @ a))
        before, after = before + norm**2, after + (norm * factors[module]) ** 2

    def changed(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = load(module)
        return a * factors[module], b

    assert norm_ratio(inputs, changed) == pytest.approx(math.sqrt(after / before), rel=1e-9)
    assert norm_ratio(inputs, lambda module: (load(module)[0], 0 * load(module)[1])) == 0


def test_a_measured_adapter_is_rounded_as_the_output_will_be(inputs: RepairInputs, tmp_path: Path) -> None:
    files = {outtype: tmp_path / f"{outtype}.gguf" for outtype in ("f32", "f16", "q8_0")}
    for outtype, file in files.items():
        write_measured(inputs, file, original_pairs(inputs), outtype)
        write_measured(inputs, file, original_pairs(inputs), outtype)  # again in its place
    sizes = [file.stat().st_size for file in files.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[1] == pytest.approx(sizes[0] / 2, rel=0.1)
