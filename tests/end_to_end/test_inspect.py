"""Oracle: the contract. Exit 0 with warnings while headers are sound, 3 when not; one JSON object; text from files
escaped wherever it is shown; no torch, which costs a second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import LITTLE, Tensor, adapter_keys
from models import Sizes, Trio, adapter_config, pairs, save_adapter
from typer.testing import CliRunner, Result

from safelora_gguf import __version__, inspect_path
from safelora_gguf.cli import app

Q = "blk.0.attn_q.weight"
PAIR = [Tensor(f"{Q}.lora_a", (4, 64)), Tensor(f"{Q}.lora_b", (96, 4))]
HOSTILE = "\x1b[2Jrm [red]bold[/red] \u202egnp"


def _inspect(path: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["inspect", str(path), *more])


def _json(path: Path) -> dict[str, Any]:
    result = _inspect(path, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found


def _adapter(path: Path, *tensors: Tensor, **keys: bytes | None) -> Path:
    path.write_bytes(LITTLE.file(adapter_keys(LITTLE, **keys), tensors or PAIR))
    return path


def test_the_json_of_an_adapter(trio: Trio) -> None:
    found = _json(trio.adapter)
    assert (found["command"], found["version"]) == ("inspect", __version__)
    assert (found["kind"], found["format"], found["architecture"]) == ("adapter", "peft", None)
    assert [(item["role"], item["path"], item["format"]) for item in found["inputs"]] == [
        ("adapter", str(trio.adapter), "peft")
    ]
    assert found["inputs"][0]["bytes"] == (trio.adapter / "adapter_model.safetensors").stat().st_size
    assert len(found["inputs"][0]["fingerprint"]) == 64
    assert {module["name"]: module["shape"] for module in found["modules"]} == {
        name: list(shape) for name, shape in trio.sizes.modules().items()
    }
    assert {(module["rank"], module["scaling"]) for module in found["modules"]} == {(4, 2.0)}
    tensors = {tensor["name"]: (tensor["type"], tensor["shape"], tensor["bytes"]) for tensor in found["tensors"]}
    assert tensors == {
        name: ("F32", list(tensor.shape), tensor.numel() * 4) for name, tensor in trio.pair_tensors.items()
    }
    assert found["totals"]["types"] == {"F32": len(trio.pair_tensors)}
    assert found["warnings"] == [] and found["metadata"]["lora_alpha"] == 8


def test_the_json_of_a_model_and_the_function_behind_it(trio: Trio) -> None:
    found = _json(trio.base)
    assert (found["kind"], found["format"], found["architecture"]) == ("model", "safetensors", "LlamaForCausalLM")
    assert "modules" not in found
    assert found == {"command": "inspect", "version": __version__, **inspect_path(trio.base).to_json()}


def test_the_tables(trio: Trio, tmp_path: Path) -> None:
    modules = _inspect(trio.adapter).stdout
    assert "model.layers.1.mlp.down_proj" in modules and "64x96" in modules and "lora_A" not in modules
    tensors = _inspect(trio.adapter, "--tensors").stdout
    assert all(name in tensors for name in trio.pair_tensors)
    many = [Tensor(f"blk.{number}.attn_q.weight", (4, 64)) for number in range(30)]
    path = tmp_path / "model.gguf"
    path.write_bytes(LITTLE.file([("general.architecture", LITTLE.text("newarch"))], many))
    short, whole, quiet = (_inspect(path, *more).stdout for more in ((), ("--tensors",), ("--quiet",)))
    assert "6 more tensors (--tensors shows all)" in short and "blk.29." not in short
    assert "blk.29.attn_q.weight" in whole and "more tensors" not in whole
    assert "note: the architecture newarch has no table" in short and "note:" not in quiet


def test_defects_are_warnings_here_and_refusals_elsewhere(trio: Trio, tmp_path: Path) -> None:
    path = _adapter(tmp_path / "a.gguf", *PAIR, adapter_lora_alpha=LITTLE.uint32(8), adapter_type=None)
    result = _inspect(path)
    assert result.exit_code == 0 and result.stderr == ""
    assert "warning: adapter.type is missing" in result.stdout
    assert "warning: 'adapter.lora.alpha' is stored as UINT32" in result.stdout
    arguments = ["project", "--base", trio.base, "--aligned", trio.aligned, "--adapter", path, "--out", tmp_path / "o"]
    assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 3


def test_many_warnings_are_cut_on_a_terminal_only(tmp_path: Path) -> None:
    shapes = [(f"blk.{number}.attn_q.weight", (number + 1, 4)) for number in range(40)]  # a sentence for each shape
    tensors = [Tensor(f"{name}.lora_a", shape) for name, shape in shapes]
    tensors += [Tensor(f"{name}.lora_b", (8, 99)) for name, _ in shapes]
    path = _adapter(tmp_path / "a.gguf", *tensors)
    assert "16 more warnings (--json has all)" in _inspect(path).stdout
    assert len(_json(path)["warnings"]) == 40


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    keys = [*adapter_keys(LITTLE, general_architecture=LITTLE.text(HOSTILE)), (HOSTILE, LITTLE.text(HOSTILE))]
    tensors = [*PAIR, Tensor(HOSTILE, (4, 4)), Tensor(f"{HOSTILE}.lora_a", (4, 4)), Tensor(f"{HOSTILE}.lora_b", (4, 4))]
    path = tmp_path / "a.gguf"
    path.write_bytes(LITTLE.file(keys, tensors))
    for more in ((), ("--tensors",)):
        shown = _inspect(path, *more).stdout
        assert "\x1b" not in shown and "\u202e" not in shown
        for line in ("architecture", " = ", "is neither half"):
            assert any("\\x1b[2Jrm [red]bold[/red] \\x202egnp" in row for row in shown.splitlines() if line in row)
    assert _json(path)["architecture"] == HOSTILE


def test_infinite_metadata_is_json(tmp_path: Path) -> None:
    found = _json(_adapter(tmp_path / "a.gguf", *PAIR, adapter_lora_alpha=LITTLE.float32(float("inf"))))
    assert found["metadata"]["adapter.lora.alpha"] == "inf" and found["modules"][0]["scaling"] is None
    adapter = save_adapter(tmp_path / "peft", pairs(Sizes().modules(), 1), adapter_config(lora_dropout=float("nan")))
    assert _json(adapter)["metadata"]["lora_dropout"] == "nan"


@pytest.mark.parametrize("damage", ["cut", "empty", "version", "nothing", "directory"])
def test_what_can_t_be_read_ends_in_one_message(tmp_path: Path, damage: str) -> None:
    path = _adapter(tmp_path / "a.gguf")
    data = path.read_bytes()
    changed = {"cut": data[:100], "empty": b"", "version": data[:4] + b"\x09" + data[5:]}
    if damage in changed:
        path.write_bytes(changed[damage])
    else:
        path.unlink()
    if damage == "directory":
        path.mkdir()
    result = _inspect(path, "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert error["file"] == str(path) and error["kind"] in ("format", "missing")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_user_s_run_imports_nothing_heavy(tmp_path: Path) -> None:
    path = _adapter(tmp_path / "a.gguf")
    code = (
        "import sys\nfrom safelora_gguf.cli import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'numpy', 'gguf'} & sys.modules.keys(), 'imported'"
    )
    command = [sys.executable, "-c", code, "inspect", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "") and "blk.0.attn_q" in result.stdout
