"""Oracles: the words in the sources' own files; PyYAML and the gguf package write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml

from converters.adapters.card import Card
from converters.source_cards import HeaderLicense, SourceCard, header_license, license_lines, source_card


def directory(path: Path, header: dict[str, Any] | None = None, *legal: str, **files: dict[str, Any]) -> Path:
    path.mkdir()
    if header is not None:
        (path / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n\n# Title\n")
    for name in legal:
        (path / name).write_text("terms")
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def gguf_file(path: Path, values: Mapping[str, str]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        writer.add_string(f"general.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def card(
    license_: str | None = None, name: str | None = None, link: str | None = None, role: str = "model"
) -> SourceCard:
    return SourceCard(role, "m", Card(license=license_, license_name=name, license_link=link))


def test_a_directory_says_it_in_its_readme(tmp_path: Path) -> None:
    header = {"license": "other", "license_name": "llama-terms", "license_link": "LICENSE", "base_model": "org/base"}
    path = directory(tmp_path / "m", header, "LICENSE", "USE_POLICY.md", "notes.txt", config={"_name_or_path": "org/m"})
    found = source_card("aligned", path)
    assert (found.role, found.name, found.repositories) == ("aligned", "m", ("org/m",))
    assert found.license == "other, llama-terms (LICENSE)"
    assert found.legal_files == ("LICENSE", "USE_POLICY.md")
    assert found.card.base_models == ("org/base",)


def test_an_adapter_says_what_it_is_for(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", None, adapter_config={"base_model_name_or_path": "org/base"})
    assert source_card("adapter", path).card.base_models == ("org/base",)
    local = directory(tmp_path / "b", None, adapter_config={"base_model_name_or_path": "/home/me/base"})
    assert source_card("adapter", local).card.base_models == ()


def test_a_gguf_file_says_it_in_its_keys(tmp_path: Path) -> None:
    keys = {"license": "apache-2.0", "license.link": "https://e.example/l", "repo_url": "https://huggingface.co/org/m"}
    path = gguf_file(tmp_path / "m.gguf", keys)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    found = source_card("model", path)
    assert found.license == "apache-2.0 (https://e.example/l)"
    assert found.repositories == ("org/m",)


def test_the_cache_of_the_hub_names_the_repository(tmp_path: Path) -> None:
    place = tmp_path / "models--org--name" / "snapshots"
    place.mkdir(parents=True)
    found = source_card("base", directory(place / "0123456789abcdef", None))
    assert (found.name, found.repositories) == ("name", ("org/name",))


def test_what_can_not_be_read_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    broken = directory(tmp_path / "d", None)
    (broken / "config.json").write_text("[")
    for path in (tmp_path / "broken.gguf", broken, tmp_path / "nothing", tmp_path / "nothing.gguf"):
        found = source_card("model", path)
        assert (found.card, found.license, found.repositories) == (Card(), None, ())


def test_one_license_is_carried_over() -> None:
    same = [card("apache-2.0"), card("apache-2.0"), card()]
    assert header_license(same) == HeaderLicense("apache-2.0")
    assert header_license([card("other", "terms", "LICENSE")]) == HeaderLicense("other", "terms", "LICENSE")
    assert header_license([card(), card()]) == HeaderLicense()


@pytest.mark.parametrize("order", [1, -1])
def test_several_licenses_all_apply(order: int) -> None:
    sources = [card("mit"), card("other", 'Strange "Terms" 2', "LICENSE"), card("llama3.1"), card("mit")][::order]
    found = header_license(sources)
    assert (found.id, found.link) == ("other", None)
    assert found.name is not None
    assert sorted(found.name.split("-and-")) == ["llama3.1", "mit", "strange-terms-2"]
    assert header_license([card("mit,apache-2.0")]) == HeaderLicense("other", "mit-and-apache-2.0")


def test_the_same_name_under_two_links_is_two_licenses() -> None:
    assert header_license([card("other", "terms", "a"), card("other", "terms", "b")]) == HeaderLicense("other", "terms")


def test_every_source_has_its_line() -> None:
    sources = [
        card("mit", role="base"),
        card(role="adapter"),
        SourceCard("model", "n", Card(), (), ("LICENSE", "NOTICE")),
    ]
    assert license_lines(sources) == [
        "base m: mit",
        "adapter m: it gives no license",
        "model n: it gives no license; beside it lie LICENSE, NOTICE",
    ]
