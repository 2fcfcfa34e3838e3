"""Oracle: sets of prompts of which no two have one in common, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters.errors import FormatError, OutputPathError, UnsupportedError, UsageError
from safelora_gguf.repair.inputs import RepairInputs
from safelora_gguf.repair.making import Method
from safelora_gguf.smoke.asking import Asking
from safelora_gguf.smoke.prompts import Prompt, PromptSet
from safelora_gguf.smoke.report import Bounds
from safelora_gguf.tune.grid import GridOptions
from safelora_gguf.tune.repair_plan import FEWEST, RepairAsked, RepairPlan, plan_repair

GIVEN = GridOptions(mus=(2.0,))


def some(harmful: int, benign: int, prefix: str = "p") -> PromptSet:
    """Without categories: each kind is dealt one by one."""
    kinds = ("harmful",) * harmful + ("benign",) * benign
    prompts = tuple(Prompt(f"{prefix}{place}", kind, f"{prefix} {place}?") for place, kind in enumerate(kinds))  # type: ignore[arg-type]
    return PromptSet("some", "1", prompts)


def saved(prompts: PromptSet, file: Path) -> Path:
    file.write_text("".join(json.dumps({"id": one.id, "kind": one.kind, "prompt": one.prompt}) + "\n"
                            for one in prompts.prompts))  # fmt: skip
    return file


def nothing() -> RepairInputs:
    return None  # type: ignore[return-value]  # nobody looks into it


def planned(
    grid: GridOptions, prompts: PromptSet, *files: Path, bounds: Bounds | None = None, opened: Any = nothing
) -> tuple[PromptSet, RepairPlan | None, tuple[str, ...]]:
    return plan_repair(RepairAsked(grid, Asking(), files, Method()), prompts, bounds or Bounds(), opened)


def ids(prompts: PromptSet) -> set[str]:
    return {prompt.id for prompt in prompts.prompts}


def test_one_half_calibrates_and_the_other_judges_everything() -> None:
    prompts = some(24, 8)
    judging, plan, notes = planned(GridOptions(), prompts)
    assert plan is not None
    assert plan.judging is judging
    assert ids(judging) & ids(plan.calibration) == set()
    assert ids(judging) | ids(plan.calibration) == ids(prompts)
    assert judging.counts["harmful"] == plan.calibration.counts["harmful"] == 12
    assert notes == ("16 of the prompts calibrate repair and judge nothing; the other 16 judge every candidate",)
    assert [repair.mu for repair in plan.repairs] == [0.5, 1, 2, 4, 8, 16, 32, 64]


def test_categories_that_repair_has_not_seen_are_named() -> None:
    names = ("arson", "burglary", "cheating")
    harmful = tuple(Prompt(f"h{place}", "harmful", f"{place}?", names[place % 3]) for place in range(36))
    _, plan, notes = planned(GridOptions(), PromptSet("some", "1", (*harmful, *some(0, 8).prompts)))
    assert plan is not None
    assert plan.halves[1].unseen_categories == {"harmful": ("burglary",)}
    assert "of categories that it has not seen (harmful: burglary)" in notes[0]


@pytest.mark.parametrize(
    ("grid", "prompts", "bounds"),
    [
        (GridOptions(), some(2 * FEWEST - 2, 8), Bounds()),
        (GridOptions(), some(40, 1), Bounds()),
        (GIVEN, some(1, 8), Bounds()),
        (GIVEN, some(40, 8), Bounds(confident=True)),
    ],
)
def test_too_few_prompts_for_two_halves_leave_repair_out_and_all_of_them_judging(
    grid: GridOptions, prompts: PromptSet, bounds: Bounds
) -> None:
    judging, plan, (note,) = planned(grid, prompts, bounds=bounds)
    assert judging is prompts
    assert plan is None
    assert note.startswith("repair was left out: ")
    assert "--repair-prompts" in note


def test_a_few_are_enough_where_a_mu_was_asked_for() -> None:
    assert planned(GIVEN, some(2, 2))[1] is not None


def test_files_calibrate_and_all_prompts_judge(tmp_path: Path) -> None:
    prompts, others = some(3, 3), some(4, 4, "q")
    both = PromptSet("both", "1", (*others.prompts, *prompts.prompts[:2]))
    judging, plan, (note,) = planned(GridOptions(), prompts, saved(both, tmp_path / "both.jsonl"))
    assert plan is not None
    assert judging is prompts
    assert {one.prompt for one in plan.calibration.prompts} == {one.prompt for one in others.prompts}
    assert note.startswith("2 prompts of both.jsonl stand in some, too")


@pytest.mark.parametrize(("harmful", "benign", "missing"), [(0, 3, "harmful"), (3, 0, "benign")])
def test_files_that_lack_a_kind_are_refused(tmp_path: Path, harmful: int, benign: int, missing: str) -> None:
    file = saved(some(harmful, benign, "q"), tmp_path / "few.jsonl")
    with pytest.raises(FormatError, match=f"leaves no {missing} prompts"):
        planned(GIVEN, some(5, 5), file)


def test_a_grid_without_repairs_divides_nothing(tmp_path: Path) -> None:
    prompts, grid = some(24, 8), GridOptions(numbers=(3,))
    assert planned(grid, prompts) == (prompts, None, ())
    with pytest.raises(UsageError, match="--repair-prompts"):
        planned(grid, prompts, saved(some(4, 4), tmp_path / "x.jsonl"))


def test_what_can_not_be_repaired_is_left_out_unless_it_was_asked_for() -> None:
    def refused() -> RepairInputs:
        raise UnsupportedError("uses DoRA")

    prompts = some(24, 8)
    assert planned(GridOptions(), prompts, opened=refused) == (prompts, None, ("repair was left out: uses DoRA",))
    with pytest.raises(UnsupportedError):
        planned(GIVEN, prompts, opened=refused)


def test_an_output_that_is_there_is_never_taken_for_what_can_not_be_repaired() -> None:
    def there() -> RepairInputs:
        raise OutputPathError("is there")

    with pytest.raises(OutputPathError):
        planned(GridOptions(), some(24, 8), opened=there)


def test_the_command_names_whatever_is_not_as_usual() -> None:
    usual = RepairAsked(GIVEN, Asking(), (), Method(outtype="f32")).command()
    assert (usual.options, usual.exact) == ((), True)
    halved = RepairAsked(GIVEN, Asking(["a b.jsonl"], limit=3), (), Method(seed=3)).command()
    assert (halved.options, halved.exact) == (("--prompts", "a b.jsonl", "--limit", "3"), False)
    apart = RepairAsked(GIVEN, Asking(["j"], max_tokens=9), ("c",), Method(eps=0.3, outtype="f16")).command()
    assert apart.exact
    expected = "--prompts c --judge-prompts j --max-tokens 9 --eps 0.3 --outtype f16"
    assert " ".join(apart.options) == expected
    other = RepairAsked(GIVEN, Asking(parallel=1, gpu_layers=99), (), Method(device="cpu"), dora_rank=8).command()
    assert " ".join(other.options) == "--dora-rank 8 --parallel 1 --gpu-layers 99 --device cpu"


@pytest.mark.parametrize("judges", [("guard", "score"), ("score",), ("keyword", "score")])
def test_judges_that_are_set_up_on_other_prompts_make_another_adapter(judges: tuple[str, ...]) -> None:
    """The score knows refusals by what the aligned model answered: here the prompts that judge, there the others."""
    command = RepairAsked(GIVEN, Asking(judges=judges), (), Method()).command()
    assert "score" in command.options
    assert not command.exact


@pytest.mark.parametrize(("shared", "named", "exact"), [(0, False, True), (2, False, False), (2, True, True)])
def test_files_that_overlap_with_what_judges_need_to_be_told_of_it(
    tmp_path: Path, shared: int, named: bool, exact: bool
) -> None:
    """`repair` calibrates with all of them unless it hears what judges."""
    prompts = some(12, 8)
    own = PromptSet("own", "1", (*some(4, 4, "q").prompts, *prompts.prompts[:shared]))
    file, judging = saved(own, tmp_path / "own.jsonl"), saved(prompts, tmp_path / "judging.jsonl")
    asking = Asking([judging] if named else [])
    _, plan, _ = plan_repair(RepairAsked(GIVEN, asking, (file,), Method()), prompts, Bounds(), nothing)
    assert plan is not None
    assert plan.command.exact is exact


def test_too_few_to_judge_by_are_told_of_where_they_were_asked_for() -> None:
    (note,) = planned(GIVEN, some(2, 2))[2]
    assert note.endswith("; 1 harmful one to judge by is too few to trust")


def test_a_journal_of_other_repairs_is_of_no_use() -> None:
    keys = []
    for method in (Method(), Method(eps=0.2), Method(tokens=9), Method(tail=3), Method(seed=1)):
        asked = RepairAsked(GIVEN, Asking(), (), method)
        plan = plan_repair(asked, some(24, 8), Bounds(), nothing)[1]
        assert plan is not None
        keys.append(json.dumps(plan.key))
    other = planned(GIVEN, PromptSet("some", "2", some(24, 8).prompts))[1]
    assert other is not None
    assert len({*keys, json.dumps(other.key)}) == 6
