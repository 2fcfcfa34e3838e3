"""What the controls say: whether a change did more than the same loss of size without it."""

from __future__ import annotations

from safelora_gguf.html.elements import Markup, join
from safelora_gguf.html.names import names_of
from safelora_gguf.html.parts import Section, badge, bullets, paragraph
from safelora_gguf.html.reading import Report, number, part, texts, truth, words
from safelora_gguf.html.text import percent

_CONTROLS = (("beats_scaled", "plain scaling"), ("beats_random", "a random subspace"))
_BEATEN = {True: ("beats", "good"), False: ("does not beat", "bad"), None: ("no clear answer against", "open")}


def controls_line(report: Report) -> str | None:
    """All of it in a sentence; None where there were no controls."""
    controls = part(report, "controls")
    told = [(truth(controls, key), what) for key, what in _CONTROLS if key in controls]
    if not told:
        return None
    name = names_of(report).text(words(controls, "projected")) or "the change"
    if all(beaten is None for beaten, _ in told):
        return f"Controls: whether {name} beats {' or '.join(what for _, what in told)} cannot be told from this."
    clauses = [
        f"whether it beats {what} cannot be told from this" if beaten is None else f"{_BEATEN[beaten][0]} {what}"
        for beaten, what in sorted(told, key=lambda each: each[0] is None)
    ]
    ratio = number(controls, "norm_ratio")
    grew = (
        "" if ratio is None or ratio <= 1 else f" At {percent(ratio)} of the adapter’s norm scaling takes nothing away."
    )
    return f"Controls: {name} {'; '.join(clauses)}.{grew}"


def controls_section(report: Report, level: int) -> Section | None:
    """Whether the change did what plain scaling or a random subspace would not have done."""
    controls = part(report, "controls")
    if not controls:
        return None
    marks = [_beaten(truth(controls, key), what) for key, what in _CONTROLS if key in controls]
    ratio, name = number(controls, "norm_ratio"), words(controls, "projected")
    drawn = ", and the same modules brought to a random subspace of the same rank" if "beats_random" in controls else ""
    how = paragraph(
        "A control changes the adapter as much as the change in question does, but knows nothing of the alignment: the "
        f"whole adapter scaled to the same total norm{'' if ratio is None else f' ({percent(ratio, 1)} of it)'}"
        f"{drawn}.",
        class_="aside",
    )
    whose = paragraph(names_of(report).markup(name, "label"), ":") if name else None
    sentences = [paragraph(sentence) for sentence in texts(controls, "sentences")]
    return Section("controls", "Against the controls", join([whose, bullets(marks, "marks"), *sentences, how]))


def _beaten(beaten: bool | None, what: str) -> Markup:
    return join([badge(*_BEATEN[beaten]), f" {what}"])
