"""The table of candidates in an HTML report.

Oracle: the report's own counts, read by eye.
"""

from __future__ import annotations

import re

from safelora_gguf.html.frontier import frontier_section


def test_as_many_weights_are_told_as_were_projected_or_repaired() -> None:
    one = {"line": "l", "stage": "full", "total": 21, "refusal_rate": 0.9, "top1": 0.8, "utility": 0.8}
    candidates = [
        one | {"name": "projected", "projected": 13, "repaired": 0},
        one | {"name": "repaired", "projected": 0, "repaired": 20},
        one | {"name": "older", "projected": 5},
    ]
    found = frontier_section({"command": "tune", "utility_is": "top1", "candidates": candidates}, 2)
    assert found is not None
    assert re.findall(r"(\d+) of 21", str(found.body)) == ["13", "20", "5"]
