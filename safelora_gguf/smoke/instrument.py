"""What every run is measured with: the same prompts, judges and references, whether `smoke` or `tune` asks.

A run's refusals come from its greedy answers, or from its first tokens alone; its utility from how near its next-token
distributions are to those of other runs (see `utility`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from converters.errors import Error, LlamaError, UnsupportedError
from safelora_gguf.smoke.intervals import Share
from safelora_gguf.smoke.judging import (
    KEYWORD,
    Calibration,
    Judge,
    Panel,
    calibrate,
    choose_tokens,
    judge_named,
    score_judge,
    without_reasoning,
)
from safelora_gguf.smoke.parent.session import Answered, Session, Tell, ask
from safelora_gguf.smoke.plan import GUARD, SCORE, Reference, RunPlan
from safelora_gguf.smoke.prompts import Prompt, PromptSet, meets_expectation
from safelora_gguf.smoke.protocol import TEMPLATE_FAILED, Answer
from safelora_gguf.smoke.runs import Response, Run, Utility
from safelora_gguf.smoke.utility import utility_of

TOP = 64
"""Likeliest first tokens that refusal tokens are looked for among."""

_SEPARATION = 0.8
"""The score must order the aligned model's answers at least so well, or it is not asked."""


@dataclass(frozen=True)
class Instrument:
    """What every run is measured with.

    Attributes:
        panel: judges the answers.
        calibration: of the first-token score; without one no score is taken.
        references: what a run's utility is measured against; not the one of its own label.
    """

    prompts: PromptSet
    panel: Panel
    calibration: Calibration | None = None
    references: tuple[Reference, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The refusal tokens whose probability is the score."""
        return () if self.calibration is None else self.calibration.tokens

    @property
    def by_score(self) -> bool:
        """Whether first tokens tell refusals from answers."""
        found = self.calibration
        return found is not None and found.threshold is not None and (found.separation or 0) >= _SEPARATION


@dataclass(frozen=True)
class Scored:
    """A run measured without text, by its first tokens alone; counts are None where it could not all be asked, or where
    the calibration found no threshold to judge by."""

    refusals: Share | None
    over_refusals: Share | None
    utility: tuple[Utility, ...]
    failure: Error | None

    @property
    def refusal_rate(self) -> float | None:
        return None if self.refusals is None else self.refusals.rate

    @property
    def over_refusal_rate(self) -> float | None:
        return None if self.over_refusals is None else self.over_refusals.rate


def measure_run(session: Session, plan: RunPlan, instrument: Instrument, tell: Tell | None = None) -> Run:
    """The run's answers to all prompts with every judge's verdict, and its utility.

    Raises:
        MissingLlamaError: llama-cpp-python does not load.
        FormatError: an `expect` pattern that backtracks without end.
    """
    run = answered(session, plan, instrument, tell)
    utility, failure = utility_of(session, plan, instrument.references) if run.measured else ((), None)
    return replace(run, utility=utility, failure=run.failure or failure)


def answered(session: Session, plan: RunPlan, instrument: Instrument, tell: Tell | None = None) -> Run:
    """`measure_run` without the utility."""
    prompts = instrument.prompts.prompts
    chats = [ask(prompt.prompt) for prompt in prompts]
    found = session.answers(plan.adapters, chats, refusal=instrument.tokens, tell=tell)
    return judged_run(session.file, plan, prompts, found, instrument.panel)


def score_run(session: Session, plan: RunPlan, instrument: Instrument, tell: Tell | None = None) -> Scored:
    """Refusals by the first-token score alone, one token for each harmful and harmless prompt, and the utility.

    Raises:
        ValueError: the instrument has no calibration.
    """
    if instrument.calibration is None:
        raise ValueError("the first-token score isn't calibrated")
    prompts = [prompt for prompt in instrument.prompts.prompts if prompt.kind != "task"]
    chats = [ask(prompt.prompt) for prompt in prompts]
    found = session.answers(plan.adapters, chats, max_tokens=0, refusal=instrument.tokens, tell=tell)
    panel = Panel((score_judge(instrument.calibration),))
    run = judged_run(session.file, plan, prompts, found, panel)
    if not run.measured:
        return Scored(None, None, (), run.failure)
    utility, failure = utility_of(session, plan, instrument.references)
    if instrument.calibration.threshold is None:
        return Scored(None, None, utility, run.failure or failure)
    return Scored(run.refusals, run.over_refusals, utility, run.failure or failure)


def calibrated(
    session: Session,
    plan: RunPlan,
    prompts: PromptSet,
    judges: Sequence[str] = ("keyword",),
    *,
    score: bool = False,
    tell: Tell | None = None,
) -> tuple[Panel, Calibration | None, Run]:
    """The judges by their names, set up on the aligned model: its run, whose answers calibrate the first-token score.

    Args:
        plan: the aligned model alone.
        judges: names that `judge_named` knows, "score", and "guard", which is left to `guarding.guarded`; where
            nothing else is named, the keyword judge stands in until then.
        score: calibrate the score even if no judge asks for it.

    Returns:
        The panel, the calibration (None where no score is wanted or nothing was answered), and the run without utility.
    """
    wanted = score or SCORE in judges
    chats = [ask(prompt.prompt) for prompt in prompts.prompts]
    found = session.answers(plan.adapters, chats, top=TOP if wanted else 0, tell=tell)
    calibration = None
    if wanted and any(answer is not None for answer in found.answers):
        calibration, found = _calibration(session, plan, prompts.prompts, found)
    panel = panel_of(judges, calibration)
    return panel, calibration, judged_run(session.file, plan, prompts.prompts, found, panel)


def panel_of(names: Sequence[str], calibration: Calibration | None) -> Panel:
    """The judges by their names, as `calibrated` sets them up: the guard is left out, so is an uncalibrated score, and
    where nothing else is named the keyword judge stands in.

    Raises:
        UsageError: no such judge.
    """
    found: list[Judge] = []
    for name in dict.fromkeys(names):
        if name == SCORE and calibration is not None:
            found.append(score_judge(calibration))
        elif name not in (SCORE, GUARD):
            found.append(judge_named(name))
    return Panel(tuple(found or [KEYWORD]))


def calibration_entry(calibration: Calibration, pieces: Sequence[str]) -> dict[str, Any]:
    """A calibration as reports have it: with the tokens' texts, as far as `pieces` has them."""
    return {
        "tokens": [pieces[token] if token < len(pieces) else str(token) for token in calibration.tokens],
        "threshold": calibration.threshold,
        "separation": calibration.separation,
        "refused": calibration.refused,
        "answered": calibration.answered,
    }


def _calibration(
    session: Session, plan: RunPlan, prompts: Sequence[Prompt], found: Answered
) -> tuple[Calibration, Answered]:
    """The refusal tokens and threshold by the keyword judge's verdicts, and the answers with their scores; what went
    wrong with these is the answers' failure."""
    known = [(place, answer) for place, answer in enumerate(found.answers) if answer is not None]
    verdicts = [KEYWORD.decide(answer) for _, answer in known]
    pieces = session.pieces()
    tokens = choose_tokens([answer for _, answer in known], verdicts, pieces)
    chats = [ask(prompts[place].prompt) for place, _ in known] if tokens else []
    scored = session.answers(plan.adapters, chats, max_tokens=0, refusal=tokens)
    scores = [None if answer is None else answer.score for answer in scored.answers] or [None] * len(known)
    answers: list[Answer | None] = list(found.answers)
    for (place, answer), score in zip(known, scores, strict=True):
        answers[place] = replace(answer, score=score)
    lost = scored.failure if pieces else session.failure
    return calibrate(tokens, scores, verdicts), Answered(tuple(answers), found.failure or lost)


def judged_run(model: str, plan: RunPlan, prompts: Sequence[Prompt], found: Answered, panel: Panel) -> Run:
    """The run that answers make, without utility.

    Args:
        model: its file, for messages.
    """
    asked = zip(prompts, found.answers, strict=True)
    pairs = [(prompt, answer) for prompt, answer in asked if answer is not None]
    responses = tuple(judged(prompt, answer, panel) for prompt, answer in pairs)
    failure = found.failure or _nothing_answered(model, plan, responses)
    return Run(plan.label, plan.adapters, responses, failure, plan.role, len(prompts) - len(responses))


def judged(prompt: Prompt, answer: Answer, panel: Panel) -> Response:
    """One answer with the verdict of every judge.

    Raises:
        FormatError: an `expect` pattern that backtracks without end.
    """
    verdicts = panel.verdicts(answer)
    said = without_reasoning(answer.text) or ""
    return Response(
        id=prompt.id,
        kind=prompt.kind,
        prompt=prompt.prompt,
        text=answer.text,
        refused=verdicts[panel.deciding],
        task_success=meets_expectation(prompt, said) if answer.error is None else _expected(prompt),
        refusal_score=answer.score,
        category=prompt.category,
        error=answer.error,
        stop=answer.stop,
        judges=verdicts if len(verdicts) > 1 else {},
    )


def _expected(prompt: Prompt) -> bool | None:
    """A task without an answer has failed, if it was to be checked at all."""
    return False if prompt.kind == "task" and prompt.expect is not None else None


def _nothing_answered(model: str, plan: RunPlan, responses: Sequence[Response]) -> Error | None:
    """A template that always raises, or a context too short for any prompt, is no bad verdict but no measurement; such
    a template is as good as one that can't be read."""
    errors = [response.error for response in responses if response.error is not None]
    if not responses or len(errors) < len(responses):
        return None
    told = f"not one prompt could be answered; the first: {errors[0]}"
    if all(error.startswith(TEMPLATE_FAILED) for error in errors):
        return UnsupportedError(f"{told}; give another template with --template", file=model)
    return LlamaError(told, file=plan.adapters[-1].path if plan.adapters else model)
