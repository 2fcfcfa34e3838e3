"""What was solved, on disk. Oracles: the tensors that were put in; the files' sizes; the system's own error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converters.errors import WriteError
from safelora_gguf.repair.solving.pair_store import PairStore


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_module_comes_back_by_mu_and_fold(tmp_path: Path) -> None:
    store = PairStore(tmp_path)
    put = {(mu, fold): {"one": noise(n, 4, 32), "two[3]": noise(n + 9, 1, 7)}
           for n, (mu, fold) in enumerate([(2.0, None), (2.0, 0), (2.0, 1), (2.5, None)])}  # fmt: skip
    for (mu, fold), tensors in put.items():
        with store.writing(mu, fold) as writer:
            for module, a in tensors.items():
                writer.put(module, a)
    for (mu, fold), tensors in put.items():
        for module, a in tensors.items():
            assert torch.equal(store.get(module, mu, fold), a)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 4 * 4 * (4 * 32 + 7)


def test_several_are_written_at_a_time_from_any_type_and_stride(tmp_path: Path) -> None:
    store, a = PairStore(tmp_path), noise(0, 32, 4)
    with store.writing(1.0) as one, store.writing(2.0, 0) as other:
        one.put("module", a.T)
        other.put("module", a.to(torch.bfloat16))
    assert torch.equal(store.get("module", 1.0), a.T)
    assert torch.equal(store.get("module", 2.0, 0), a.to(torch.bfloat16).float())


def test_only_what_is_whole_is_there(tmp_path: Path) -> None:
    store = PairStore(tmp_path)
    with pytest.raises(RuntimeError), store.writing(2.0) as writer:
        writer.put("module", noise(0, 2, 2))
        assert not store.has(2.0)
        raise RuntimeError
    assert not store.has(2.0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError):
        store.get("module", 2.0)


def test_what_is_dropped_takes_no_room(tmp_path: Path) -> None:
    store = PairStore(tmp_path)
    for fold in (None, 0):
        with store.writing(2.0, fold) as writer:
            writer.put("module", noise(0, 2, 2))
    store.drop(2.0)
    store.drop(3.0)
    assert not store.has(2.0)
    assert store.has(2.0, 0)
    assert len(list(tmp_path.iterdir())) == 1


def test_no_room_is_told(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "gone")
    with pytest.raises(WriteError, match="TMPDIR"), store.writing(2.0):
        pass
