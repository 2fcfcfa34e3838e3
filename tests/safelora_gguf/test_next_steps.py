"""The commands that reports name. Oracle: the command line, which must take what it is told to; and the list of classes
of upstream's converter where it is upstream's."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from extrapolating import ALIGNED
from typer.testing import CliRunner

from converters.description import describe_model
from safelora_gguf.cli import app
from safelora_gguf.next_steps import into_gguf


def test_the_command_is_one_that_the_command_line_knows(tmp_path: Path) -> None:
    command = into_gguf(describe_model(ALIGNED), shlex.quote(str(ALIGNED)))
    words = shlex.split(command.replace("MODEL.gguf", str(tmp_path / "model.gguf")))
    assert words[0] == "safelora-gguf"
    assert CliRunner().invoke(app, [*words[1:], "--dry-run"]).exit_code == 0


@pytest.mark.parametrize("model_class", ["GPT2LMHeadModel", "FalconForCausalLM"])
def test_of_other_families_it_is_upstreams(model_class: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [model_class]}))
    assert into_gguf(describe_model(tmp_path), "there") == "convert_hf_to_gguf.py there --outfile MODEL.gguf"
