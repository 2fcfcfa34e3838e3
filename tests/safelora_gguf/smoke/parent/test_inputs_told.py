"""Oracle: the protocol's sentences. A child says something else of continued prompts or captured inputs."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from replying_child import loaded, replying

from converters.errors import LlamaError
from safelora_gguf.smoke.parent.session import ask
from safelora_gguf.smoke.parent.wire import Patience
from safelora_gguf.smoke.protocol import Continued, InputGroup, InputShape, Reading

PATIENCE = Patience.for_prompts(1, 1)
CHATS = {3: ask("one"), 7: ask("two")}
READINGS = {3: Reading((0, 1), (0, 1)), 7: Reading((2,), (0,))}
GROUP = {"weights": ["a", "b"], "width": 4, "rows": 3, "slots": 1, "used": 0, "offset": 0}
GROUP_BYTES = 3 * (4 * 2 + 4)


def continued(**changed: Any) -> str:
    told = {"prompt": [0, 1], "answer": [2], "text": "", "stop": "end", "error": None, **changed}
    return json.dumps({"item": 3, "continued": told})


@pytest.mark.parametrize(
    "reply",
    [
        continued(prompt=[]), continued(prompt=[3]), continued(prompt=[-1]), continued(prompt=[True]),
        continued(prompt=[0.0]), continued(prompt="01"), continued(prompt=[0] * 64), continued(answer=None),
        continued(answer=[0] * 9), continued(answer=[3]), continued(text=None), continued(stop="bored"),
        continued(error=1), continued(more=1), '{"item": 3, "continued": {}}', '{"item": 3, "answer": {"text": "a"}}',
    ],
)  # fmt: skip
def test_continuations_are_checked(tmp_path: Path, reply: str) -> None:
    with loaded(replying(tmp_path, reply)) as process, pytest.raises(LlamaError, match="no valid reply"):
        dict(process.continuations(CHATS, max_tokens=8, patience=PATIENCE))
    with loaded(replying(tmp_path, continued(prompt=[0] * 63))) as process:
        stream = process.continuations(CHATS, max_tokens=8, patience=PATIENCE)
        assert next(stream) == (3, Continued((0,) * 63, (2,), ""))


def file_of(scales: Sequence[float] = (1, 1, 1), experts: Sequence[int] = (), width: int = 4) -> bytes:
    """Rows of one group, one slot each."""
    return struct.pack(f"<{3 * width}e3f{len(experts)}i", *(range(3 * width)), *scales, *experts)


def captured(
    tmp_path: Path, *lines: str, data: bytes | None = None, experts: int = 0
) -> tuple[dict[int, str | None], tuple[InputGroup, ...]]:
    """What is believed of a child that says these lines and leaves this file."""
    file, found = tmp_path / "inputs", list[tuple[InputGroup, ...]]()
    file.write_bytes(file_of() if data is None else data)
    weights = {"a": InputShape(4, experts), "b": InputShape(4, experts)}
    with loaded(replying(tmp_path, *lines)) as process:
        stream = process.capture(
            READINGS, weights, file=file, patience=PATIENCE, finish=lambda groups, _notes: found.append(groups)
        )
        rows = dict(stream)
    return rows, found[0]


def rows_of(key: Any, captured: Any, **changed: Any) -> str:
    return json.dumps({"item": key, "captured": captured, "error": None, **changed})


def written(*groups: Any, size: Any = GROUP_BYTES) -> str:
    return json.dumps({"ok": {"groups": groups, "notes": [], "bytes": size}})


def test_a_capture_that_can_be_is_believed(tmp_path: Path) -> None:
    lines = (rows_of(7, 0, error="too long"), rows_of(3, 2), written(GROUP))
    assert captured(tmp_path, *lines) == ({7: "too long", 3: None}, (InputGroup(("a", "b"), 4, 3, 1, 0, 0),))


def test_nothing_is_written_where_nothing_was_read(tmp_path: Path) -> None:
    lines = (rows_of(3, 0, error="too long"), rows_of(7, 0, error="NaN"), written(size=0))
    assert captured(tmp_path, *lines, data=b"") == ({3: "too long", 7: "NaN"}, ())


@pytest.mark.parametrize(
    "reply",
    [
        rows_of(7, 2), rows_of(7, 0), rows_of(7, -1), rows_of(7, "1"), rows_of(7, 1, error="no"),
        rows_of(7, 1, error=0), rows_of(4, 1), rows_of(7, 1, more=1), '{"item": 7, "captured": 1}',
    ],
)  # fmt: skip
def test_captured_items_are_checked(tmp_path: Path, reply: str) -> None:
    with pytest.raises(LlamaError, match="no valid reply while capturing inputs"):
        captured(tmp_path, rows_of(3, 2), reply, written(GROUP))


@pytest.mark.parametrize(
    "reply",
    [
        written(), written(GROUP, GROUP), written({**GROUP, "weights": ["a"]}), written({**GROUP, "weights": "ab"}),
        written({**GROUP, "weights": ["a", "b", "c"]}), written({**GROUP, "weights": ["a", "a"]}), written([]),
        written({**GROUP, "rows": 2}), written({**GROUP, "width": 5}), written({**GROUP, "width": 0}),
        written({**GROUP, "width": "4"}), written({**GROUP, "slots": 0}), written({**GROUP, "slots": 2}),
        written({**GROUP, "used": 1}), written({**GROUP, "used": -1}), written({**GROUP, "offset": 64}),
        written({**GROUP, "offset": -64}), written({**GROUP, "offset": 2**80}), written({**GROUP, "width": 2**80}),
        written({**GROUP, "more": 1}), written(GROUP).replace("[], ", "[1], "),
        written(GROUP, size=35), written(GROUP, size=None),
        written({**GROUP, "weights": ["a"]}, {**GROUP, "weights": ["b"]}), '{"ok": {"items": 2}}', '{"ok": null}',
    ],
)  # fmt: skip
def test_where_inputs_stand_is_checked(tmp_path: Path, reply: str) -> None:
    with pytest.raises(LlamaError, match="no valid reply while capturing inputs"):
        captured(tmp_path, rows_of(3, 2), rows_of(7, 1), reply)


def test_inputs_of_what_was_read_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match="no valid reply while capturing inputs"):
        captured(tmp_path, rows_of(3, 2), rows_of(7, 0, error="NaN"), written(size=0), data=b"")


def test_a_file_of_inputs_that_is_none_is_not_believed(tmp_path: Path) -> None:
    lines = (rows_of(3, 2), rows_of(7, 1), written(GROUP))
    for size in (0, GROUP_BYTES - 1, GROUP_BYTES + 1):
        with pytest.raises(LlamaError, match="no valid reply while capturing inputs"):
            captured(tmp_path, *lines, data=file_of()[:size].ljust(size, b"\0"))


NARROW = {**GROUP, "width": 3}
ROUTED = {**GROUP, "used": 2}


@pytest.mark.parametrize(
    ("group", "data", "experts", "right"),
    [
        (GROUP, file_of(), 0, True),
        (NARROW, file_of(width=3), 0, False),
        (GROUP, file_of((1, 0, 1)), 0, False),
        (GROUP, file_of((1, -1, 1)), 0, False),
        (GROUP, file_of((1, 3, 1)), 0, False),
        (GROUP, file_of((0.5, 2.0**-126, 2.0**100)), 0, True),
        (GROUP, file_of(), 4, False),
        (ROUTED, file_of(experts=[0, 1, 3, 2, 1, 0]), 0, False),
        (ROUTED, file_of(experts=[0, 1, 3, 2, 1, 0]), 4, True),
        (ROUTED, file_of(experts=[0, 1, 4, 2, 1, 0]), 4, False),
        (ROUTED, file_of(experts=[0, 1, -1, 2, 1, 0]), 4, False),
        (ROUTED, file_of(experts=[0, 0, 0, 0, 0, 0]), 1, False),
    ],
    ids=[
        "right", "width", "no scale", "negative", "no power of two", "scales", "stack told as plain",
        "plain told as stack", "stack", "no such expert", "no expert", "more than there are",
    ],
)  # fmt: skip
def test_inputs_are_held_against_the_weights(
    group: Any, data: bytes, experts: int, right: bool, *, tmp_path: Path
) -> None:
    lines = (rows_of(3, 2), rows_of(7, 1), written(group, size=len(data)))
    if right:
        assert captured(tmp_path, *lines, data=data, experts=experts)[0] == {3: None, 7: None}
    else:
        with pytest.raises(LlamaError, match="no valid reply while capturing inputs"):
            captured(tmp_path, *lines, data=data, experts=experts)


def test_rows_of_what_was_not_read_need_no_scale(tmp_path: Path) -> None:
    data = file_of((1, 1, 0))
    captured(tmp_path, rows_of(3, 2), rows_of(7, 0, error="no"), written(GROUP), data=data)
    with pytest.raises(LlamaError, match="lacks rows"):
        captured(tmp_path, rows_of(3, 2), rows_of(7, 1), written(GROUP), data=data)
