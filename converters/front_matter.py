"""The header of a model card: the YAML between the two lines `---` at the beginning of a README.md."""

from __future__ import annotations

from pathlib import Path


def front_matter(path: Path, most: int) -> str:
    """The header's text; empty where there is no such file, or it has none that ends within so many bytes."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return ""
        with path.open("rb") as file:
            lines = file.read(most).decode("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return ""
    end = lines.index("---", 1) if lines[:1] == ["---"] and "---" in lines[1:] else 0
    return "\n".join(lines[1:end])
