"""Tuning: which change of an adapter keeps most of it among those that refuse enough, measured in llama.cpp.

`search` finds it and knows nothing of what is measured; `grid` has the candidates, `repair_line` those that are
repaired, which `repairing` makes; `measuring` measures them; `journal` remembers what was measured; `running` is the
whole course, `tuning` what it needs, `preparing` and `repair_plan` the checks before it.
"""

from safelora_gguf.smoke.asking import Asking
from safelora_gguf.tune.grid import GridOptions
from safelora_gguf.tune.preparing import prepare_tuning, tune_adapter
from safelora_gguf.tune.report import TuneReport

__all__ = ["Asking", "GridOptions", "TuneReport", "prepare_tuning", "tune_adapter"]
