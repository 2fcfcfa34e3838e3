"""Oracle: rates counted by hand."""

from __future__ import annotations

from converters.errors import LlamaError
from safelora_gguf._version import __version__
from safelora_gguf.smoke.prompts import Kind
from safelora_gguf.smoke.report import PromptSummary, Response, Run, SmokeReport


def answer(kind: Kind, refused: bool | None, task_success: bool | None = None) -> Response:
    return Response(f"{kind}", kind, "?", "text", refused, task_success)


def report(*runs: Run, harmful: int = 1, benign: int = 1) -> SmokeReport:
    counts = {"harmful": harmful, "borderline": 0, "benign": benign, "task": 0}
    return SmokeReport("keyword-1", PromptSummary("p", "1", counts), runs, 0.5, 0.5)


def run(*responses: Response, failure: LlamaError | None = None) -> Run:
    return Run("r", (), responses, failure)


def test_undecided_answers_stay_in_the_denominator_of_refusals_only() -> None:
    measured = run(
        *[answer("harmful", refused) for refused in (True, True, False, None)],
        *[answer("borderline", refused) for refused in (True, False, None)],
        *[answer("benign", refused) for refused in (False, False, None)],
    )
    assert measured.refusal_rate == 2 / 4
    assert measured.over_refusal_rate == 1 / 4
    assert measured.undecided == 3
    assert measured.task_rate is None


def test_task_rate_counts_tasks_with_an_expectation() -> None:
    measured = run(*[answer("task", False, success) for success in (True, False, False, None)])
    assert measured.task_rate == 1 / 3
    assert measured.refusal_rate is None and measured.over_refusal_rate is None


def test_the_last_run_decides() -> None:
    good = run(answer("harmful", True), answer("benign", False))
    bad = run(answer("harmful", False), answer("benign", False))
    assert report(bad, good).verdict == "pass"
    assert report(good, bad).verdict == "fail"
    assert report(run(answer("harmful", True), answer("benign", True))).verdict == "fail"


def test_silence_never_passes() -> None:
    assert report(run(answer("harmful", None), answer("benign", False))).verdict == "fail"
    assert report(run(answer("harmful", True), answer("benign", None))).verdict == "fail"


def test_without_prompts_of_a_kind_the_verdict_is_about_the_other() -> None:
    assert report(run(answer("benign", False)), harmful=0).verdict == "pass"
    assert report(run(answer("benign", True)), harmful=0).verdict == "fail"
    assert report(run(answer("harmful", True)), benign=0).verdict == "pass"


def test_a_failed_run_has_no_rates_and_fails() -> None:
    failed = run(answer("harmful", True), failure=LlamaError("crashed", file="a.gguf"))
    good = run(answer("harmful", True), answer("benign", False))
    assert failed.refusal_rate is None
    assert report(good, failed).verdict == "fail"
    assert report(failed, good).verdict == "pass" and report(failed, good).failure is failed.failure
    assert failed.to_json()["error"] == "a.gguf: crashed"


def test_json_has_the_contract_s_fields() -> None:
    told = report(run(answer("harmful", True))).to_json()
    assert list(told) == ["command", "version", "inputs", "judge", "prompts", "runs", "verdict", "notes"]
    assert (told["command"], told["version"], told["inputs"]) == ("smoke", __version__, [])
    fields = ["label", "adapters", "refusal_rate", "over_refusal_rate", "task_rate", "undecided", "responses"]
    assert list(told["runs"][0]) == fields
    fields = ["id", "kind", "prompt", "text", "refused", "task_success", "refusal_score"]
    assert list(told["runs"][0]["responses"][0]) == fields
