"""Cards of every command that writes them carry the licenses of all sources.

Oracles: yaml, which reads them back, and the sources' own cards.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from safelora_gguf.cli import app

FAMILY = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family"
LICENSES = {"base": "mit", "aligned": "llama2", "adapter": "cc-by-nc-4.0"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    for name, license_ in LICENSES.items():
        shutil.copytree(FAMILY / name, root / name)
        (root / name / "README.md").write_text(f"---\nlicense: {license_}\n---\n")
    return root


def header(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


@pytest.mark.parametrize(
    ("command", "card", "sources"),
    [
        ("project --base base --aligned aligned --adapter adapter --out OUT.gguf --card", "OUT.md", LICENSES),
        ("project --base base --aligned aligned --adapter adapter --out OUT --card", "OUT/README.md", LICENSES),
        ("convert adapter adapter --base aligned --out OUT.gguf --card", "OUT.md", ("aligned", "adapter")),
        ("merge --model aligned --adapter adapter --out OUT --card", "OUT/README.md", ("aligned", "adapter")),
        ("merge --model aligned --adapter adapter --out OUT.gguf --card", "OUT.md", ("aligned", "adapter")),
        ("extrapolate --base base --aligned aligned --out OUT.gguf --card OUT.md", "OUT.md", ("base", "aligned")),
        ("extrapolate --base base --aligned aligned --out OUT --as model", "OUT/README.md", ("base", "aligned")),
        ("convert model aligned --out OUT.gguf --card", "OUT.md", ("aligned",)),
    ],
)
def test_the_licenses_of_all_sources_are_carried_over(
    family: Path, tmp_path: Path, command: str, card: str, sources: tuple[str, ...]
) -> None:
    out = str(tmp_path / "made")
    words = [str(family / word) if word in LICENSES else word.replace("OUT", out) for word in command.split(" ")]
    words = ["adapter" if number == 1 and words[0] == "convert" and command.split()[1] == "adapter" else word
             for number, word in enumerate(words)]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    text = Path(card.replace("OUT", out)).read_text()
    names = sorted(LICENSES[source] for source in sources)
    assert all(name in text for name in names)
    found = header(text)
    if len(names) == 1:
        assert found["license"] == names[0]
    else:
        assert found["license"] == "other"
        assert all(name in found["license_name"] for name in names)
    assert str(family) not in text
