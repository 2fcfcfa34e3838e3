"""How llama.cpp is asked, as its user says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safelora_gguf.smoke.inputs import check_numbers, default_threads, read_template
from safelora_gguf.smoke.parent.session import LOAD_TIMEOUT, PROMPT_TIMEOUT
from safelora_gguf.smoke.protocol import ModelOptions
from safelora_gguf.smoke.report import Bounds


@dataclass(frozen=True)
class Asking:
    """How llama.cpp is asked; see `smoke_test`."""

    prompts: Sequence[str | Path] = ()
    judges: Sequence[str] = ("keyword",)
    judge_model: str | Path | None = None
    max_tokens: int = 64
    threads: int | None = None
    gpu_layers: int = 0
    ctx: int | None = None
    system: str | None = None
    template: str | Path | None = None
    limit: int | None = None
    seed: int = 0
    parallel: int = 16
    time_limit: float = PROMPT_TIMEOUT
    load_limit: float = LOAD_TIMEOUT

    def check(self, bounds: Bounds) -> None:
        """That all numbers, those of the bounds too, are in their ranges.

        Raises:
            UsageError: one isn't.
        """
        check_numbers(
            min_refusal=bounds.min_refusal,
            max_over_refusal=bounds.max_over_refusal,
            max_tokens=self.max_tokens,
            threads=self.threads,
            gpu_layers=self.gpu_layers,
            ctx=self.ctx,
            timeouts=(self.time_limit, self.load_limit),
            limit=self.limit,
            parallel=self.parallel,
        )

    def options(self, model: str | Path) -> ModelOptions:
        """For one model.

        Raises:
            FileMissingError, FormatError: the template can't be used.
        """
        return ModelOptions(
            str(model),
            self.threads or default_threads(model),
            self.gpu_layers,
            self.ctx,
            self.max_tokens,
            self.system,
            read_template(self.template),
            self.parallel,
            self.time_limit,
        )

    def settings(self, options: ModelOptions) -> dict[str, Any]:
        """As options of the command line, for reports.

        Args:
            options: this one's own of a model.
        """
        own = {key: value for key, value in asdict(options).items() if key not in ("model", "prompt_seconds")}
        template = None if self.template is None else str(self.template)
        return {**own, "template": template, "time_limit": self.time_limit, "limit": self.limit, "seed": self.seed}
