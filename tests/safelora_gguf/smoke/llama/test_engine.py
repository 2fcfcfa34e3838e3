"""Oracle: llama_decode, one sequence at a time in a loop of ten lines on a fresh context; softmax in float64."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_models import BIGRAM_TEMPLATE, CHAT_TEMPLATE, END, Kind, write_bigram, write_random

llama_cpp = pytest.importorskip("llama_cpp")
lib = llama_cpp.llama_cpp

from converters.llama_log import LlamaLog  # noqa: E402 - these import llama_cpp
from safelora_gguf.smoke.llama.engine import Engine, Item  # noqa: E402
from safelora_gguf.smoke.llama.errors import EngineError  # noqa: E402
from safelora_gguf.smoke.protocol import AdapterChoice, Answer, ModelOptions  # noqa: E402

pytestmark = pytest.mark.llama

TEXTS = ["Hi", "Tell me about stones", "Hi", *(f"{'very ' * n}long question {n}" for n in range(9))]
MANY = [*TEXTS, "a word " * 50, *(f"{n} " * 90 for n in range(8))]  # longer than one batch


@pytest.fixture(scope="module")
def log() -> LlamaLog:
    return LlamaLog()


@pytest.fixture
def engine(log: LlamaLog) -> Callable[..., Engine]:
    return lambda file, **options: Engine(ModelOptions(str(file), **options), log)


def items(texts: Sequence[str]) -> list[Item]:
    return [Item(key, ({"role": "user", "content": text},)) for key, text in enumerate(texts)]


def answers(engine: Engine, texts: Sequence[str], **options: Any) -> list[Answer]:
    options = {"max_tokens": 12, "top": 3, "refusal": [5, 7, 70], **options}
    found = dict(engine.answers(items(texts), lambda: None, **options))
    return [found[key] for key in range(len(texts))]


class Plain:
    """llama.cpp without anything of ours: one sequence, token by token after the prompt, nothing kept."""

    def __init__(self, model: Path, adapters: Sequence[tuple[Path, float]] = ()) -> None:
        self.model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.adapters = [(lib.llama_adapter_lora_init(self.model, str(path).encode()), s) for path, s in adapters]

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        room = (lib.llama_token * (4 * len(data) + 8))()
        return list(room[: lib.llama_tokenize(self.vocab, data, len(data), room, len(room), True, True)])

    def logits(self, tokens: Sequence[int], continued: int) -> tuple[list[int], Any]:
        """Greedy continuation of at most `continued` tokens, its end included, and the logits before each."""
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 1024
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = lib.llama_init_from_model(self.model, params)
        if self.adapters:
            pointers = (lib.llama_adapter_lora_p_ctypes * len(self.adapters))(*(a for a, _ in self.adapters))
            scales = (ctypes.c_float * len(self.adapters))(*(scale for _, scale in self.adapters))
            assert lib.llama_set_adapters_lora(context, pointers, len(self.adapters), scales) == 0
        follows: list[int] = []
        rows: list[Any] = []
        fed = list(tokens)
        while len(follows) < continued and not (follows and lib.llama_vocab_is_eog(self.vocab, follows[-1])):
            array = (lib.llama_token * len(fed))(*fed)
            assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(fed))) == 0
            row = lib.llama_get_logits_ith(context, -1)
            rows.append(np.array(row[: lib.llama_vocab_n_tokens(self.vocab)], np.float64))
            follows.append(int(rows[-1].argmax()))
            fed = follows[-1:]
        lib.llama_free(context)
        return follows, np.array(rows)

    def text(self, tokens: Sequence[int]) -> str:
        kept = [token for token in tokens if not lib.llama_vocab_is_eog(self.vocab, token)]
        array, buffer = (lib.llama_token * len(kept))(*kept), ctypes.create_string_buffer(4096)
        size = lib.llama_detokenize(self.vocab, array, len(kept), buffer, 4096, False, True)
        return buffer.raw[:size].decode("utf-8", errors="replace")


def rendered(text: str) -> str:
    return f"[user] {text}\n[assistant] "


def log_softmax(logits: Any) -> Any:
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def agree(found: Sequence[Answer], plain: Plain, prompts: Sequence[str]) -> None:
    """Logits are the same up to the half precision of keys and values; where two tokens are as good as equally likely,
    that may turn an answer."""
    same = 0
    for answer, prompt in zip(found, prompts, strict=True):
        follows, logits = plain.logits(plain.tokens(prompt), 12)
        assert answer.error is None
        same += answer.text == plain.text(follows)
        log_p = log_softmax(logits[0])
        assert [token for token, _ in answer.top] == list(np.argsort(-log_p)[:3])
        np.testing.assert_allclose([value for _, value in answer.top], sorted(log_p)[:-4:-1], atol=1e-3)
        inside = np.exp(log_p[[5, 7, 70]]).sum()
        assert answer.score == pytest.approx(np.log(inside / (1 - inside)), abs=1e-3)
    assert same >= 0.95 * len(prompts) - 1


@pytest.mark.parametrize("parallel", [1, 3, 16])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba", "jamba"])
def test_prompts_decoded_together_answer_as_each_alone(
    engine: Callable[..., Engine], tmp_path: Path, kind: Kind, parallel: int
) -> None:
    """All begin with the same characters, so the shared beginning is read once and lent, in recurrent models, too."""
    file = write_random(tmp_path / "m.gguf", kind, context=1024)
    together = engine(file, parallel=parallel)
    found = answers(together, MANY)
    agree(found, Plain(file), [rendered(text) for text in MANY])
    assert answers(together, MANY) == found
    assert {answer.stop for answer in found} <= {"length", "end"}


def test_a_long_common_beginning_is_read_once(engine: Callable[..., Engine], tmp_path: Path) -> None:
    file = write_random(tmp_path / "m.gguf", "llama", context=1024)
    system = "Be brief. " * 40
    together = engine(file, system=system)
    before = together.decoded
    found = answers(together, TEXTS)
    plain = Plain(file)
    prompts = [f"[system] {system}\n{rendered(text)}" for text in TEXTS]
    agree(found, plain, prompts)
    assert together.decoded - before < len(plain.tokens(prompts[0])) + sum(len(text) + 45 for text in TEXTS)


def test_the_same_prompt_many_times(engine: Callable[..., Engine], tmp_path: Path) -> None:
    """All of it is common but the last token, after which the answer comes."""
    file = write_random(tmp_path / "m.gguf", "llama")
    agree(answers(engine(file), ["Hi"] * 20), Plain(file), [rendered("Hi")] * 20)


def test_prompts_without_a_common_beginning(engine: Callable[..., Engine], tmp_path: Path) -> None:
    file = write_random(tmp_path / "m.gguf", "llama", template="{{ messages[0]['content'] }}")
    agree(answers(engine(file), TEXTS), Plain(file), TEXTS)


def test_the_beginning_of_sequence_stands_once(engine: Callable[..., Engine], tmp_path: Path) -> None:
    file = write_random(tmp_path / "m.gguf", "llama", template="{{ bos_token }}" + CHAT_TEMPLATE)
    agree(answers(engine(file), TEXTS), Plain(file), [rendered(text) for text in TEXTS])


def test_swapped_adapters_answer_as_they_do_alone(engine: Callable[..., Engine], tiny: Any, tmp_path: Path) -> None:
    file = tiny.model(tmp_path / "m.gguf", template=CHAT_TEMPLATE)
    one = tiny.adapter(tmp_path / "one.gguf", name="blk.0.attn_output.weight")
    two = tiny.adapter(tmp_path / "two.gguf", seed=5, name="blk.1.attn_output.weight")
    together = engine(file)
    seen = []
    for adapters in ([(one, 1.0)], [], [(two, -0.5)], [(one, 1.0)], [(one, 0.5), (two, 1.0)]):
        together.set_adapters([AdapterChoice(str(path), scale) for path, scale in adapters])
        found = answers(together, TEXTS)
        agree(found, Plain(file, adapters), [rendered(text) for text in TEXTS])
        seen.append([(answer.text, answer.score) for answer in found])
    assert seen[0] == seen[3]
    assert seen[0] != seen[1] != seen[2]


def test_a_rejected_adapter_leaves_the_model_without_one(
    engine: Callable[..., Engine], model: Path, adapter: Path, foreign: dict[str, Path]
) -> None:
    together = engine(model)
    alone = answers(together, TEXTS)
    together.set_adapters([AdapterChoice(str(adapter))])
    for file in foreign.values():
        with pytest.raises(EngineError) as caught:
            together.set_adapters([AdapterChoice(str(adapter)), AdapterChoice(str(file))])
        assert caught.value.kind == "rejected"
    assert answers(together, TEXTS) == alone


def test_a_bigram_model_says_what_its_pairs_say(engine: Callable[..., Engine], tmp_path: Path) -> None:
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "I", "I": " can't", " can't": " help", " help": END})
    (answer,) = answers(engine(file), ["Hello"], refusal=[259 + 1])
    assert (answer.text, answer.stop) == ("I can't help", "end")
    assert answer.top[0][0] == 260
    tokens = len(gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].data)
    assert answer.top[0][1] == pytest.approx(-np.log1p((tokens - 1) * np.exp(-20)), abs=1e-7)
    assert answer.score == pytest.approx(20 - np.log(tokens - 1), abs=1e-2)


def test_nothing_is_generated_where_the_first_token_is_asked_for_alone(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    together = engine(write_random(tmp_path / "m.gguf", "llama"))
    full, first = answers(together, TEXTS), answers(together, TEXTS, max_tokens=0)
    assert [answer.text for answer in first] == [""] * len(TEXTS)
    assert [[token for token, _ in answer.top] for answer in first] == [[t for t, _ in answer.top] for answer in full]
    np.testing.assert_allclose([a.score or 0 for a in first], [a.score or 0 for a in full], atol=1e-3)
    assert [answer.score for answer in answers(together, TEXTS, refusal=[], top=0)] == [None] * len(TEXTS)
    ending = engine(write_bigram(tmp_path / "b.gguf", {"<answer>": END}))
    assert [answers(ending, ["x"], max_tokens=most)[0].stop for most in (0, 1)] == ["length", "end"]


def test_a_prompt_too_long_and_one_that_fills_the_context(engine: Callable[..., Engine], tmp_path: Path) -> None:
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "la", "la": "la"}, context=256)
    fits = "x" * 240  # with BOS, the line's end and <answer> 243 tokens
    over, full, short = answers(engine(file), ["x" * 253, fits, "x"], max_tokens=20)
    assert over.error == "the prompt is 256 tokens long, the context 256"
    assert (full.text, full.stop) == ("la" * 13, "length")
    assert (short.text, short.stop) == ("la" * 20, "length")


def test_prompts_that_do_not_fit_together_wait(engine: Callable[..., Engine], tmp_path: Path) -> None:
    """Eight of 800 tokens and 100 to come, 4096 cells: four at a time."""
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "la", "la": "la"}, context=1024)
    texts = [str(n) * 800 for n in range(8)]
    assert [(a.text, a.error) for a in answers(engine(file), texts, max_tokens=100)] == [("la" * 100, None)] * 8


def test_a_time_limit_cuts_what_never_stops_and_nothing_else(
    engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that ticks once each time it is read."""
    ticks: Iterator[int] = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))
    template = "{{ messages[0]['content'] }}"
    follow = {"<on>": "la", "la": "la", "<off>": "no"}
    file = write_bigram(tmp_path / "m.gguf", follow, template=template)
    first, second, third = answers(
        engine(file, prompt_seconds=50.0, parallel=2), ["<on>", "<off>", "<off>"], max_tokens=400
    )
    assert (first.stop, second.stop, third.stop) == ("time", "end", "end")
    assert (second.text, third.text) == ("no", "no")
    assert set(first.text.split("la")) == {""}
    assert 20 < len(first.text) // 2 < 60


def test_a_template_that_raises_costs_its_own_prompt_alone(engine: Callable[..., Engine], tmp_path: Path) -> None:
    raising = "{% if 'evil' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + BIGRAM_TEMPLATE
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "yes"}, template=raising)
    bad, good = answers(engine(file), ["evil", "fine"])
    assert bad == Answer("", "the chat template raised ValueError: no")
    assert (good.text, good.error) == ("yes", None)


def test_an_answer_begins_with_the_reasoning_tag_that_its_prompt_ends_in(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    follow = {"<think>": "hm", "hm": "hm"}
    file = write_bigram(tmp_path / "m.gguf", follow, template="{{ messages[0]['content'] }}<think>\n<think>")
    assert answers(engine(file), ["x"], max_tokens=3)[0].text == "<think>hmhmhm"


def test_prompts_wait_where_a_large_context_can_not_be_made(
    engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = lib.llama_init_from_model
    monkeypatch.setattr(lib, "llama_init_from_model", lambda m, p: make(m, p) if p.n_ctx <= 1024 else None)
    file = write_random(tmp_path / "m.gguf", "llama")
    small = engine(file)
    assert small.notes == (
        "llama.cpp could not make a context of 4096 tokens for 16 prompts at a time; it works with 1024 for 4",
    )
    assert small.n_ctx == 512
    agree(answers(small, TEXTS), Plain(file), [rendered(text) for text in TEXTS])
    with pytest.raises(EngineError, match="could not make a context of 2048 tokens"):
        engine(file, ctx=2048)


def test_logits_that_are_not_numbers_cost_the_item(engine: Callable[..., Engine], tiny: Any, tmp_path: Path) -> None:
    broken = tiny.adapter(tmp_path / "nan.gguf")
    data = bytearray(broken.read_bytes())
    data[-4:] = np.array([np.nan], np.float32).tobytes()
    broken.write_bytes(data)
    together, record = engine(tiny.model(tmp_path / "m.gguf")), tmp_path / "record"
    list(together.record(items(TEXTS), lambda: None, max_tokens=9, file=record))
    together.set_adapters([AdapterChoice(str(broken))])
    told = "llama.cpp computed logits that are not numbers (NaN)"
    assert answers(together, TEXTS) == [Answer("", told)] * len(TEXTS)
    assert sorted(together.diverge(record, lambda: None)) == [(key, None, told) for key in range(len(TEXTS))]


def test_recorded_and_reread_distributions_are_the_dense_divergence(
    engine: Callable[..., Engine], tiny: Any, tmp_path: Path
) -> None:
    file = tiny.model(tmp_path / "m.gguf", template=CHAT_TEMPLATE)
    tuned = tiny.adapter(tmp_path / "a.gguf", name="blk.0.attn_output.weight")
    together, record = engine(file), tmp_path / "record"
    asked = items([*TEXTS, "x" * 600])
    recorded = {key: (n, told) for key, n, told in together.record(asked, lambda: None, max_tokens=9, file=record)}
    assert recorded.pop(len(TEXTS))[1] is not None
    for divergence, told in reread(together, record).values():
        assert (divergence.top1, told) == (1.0, None)
        assert divergence.kl < 1e-5
    together.set_adapters([AdapterChoice(str(tuned), 0.3)])
    plain, other = Plain(file), Plain(file, [(tuned, 0.3)])
    found = reread(together, record)
    assert sorted(found) == list(range(len(TEXTS)))
    for key, text in enumerate(TEXTS):
        prompt = plain.tokens(rendered(text))
        follows, logits = plain.logits(prompt, 9)
        again = np.array([other.logits([*prompt, *follows[:n]], 1)[1][0] for n in range(len(follows))])
        log_p, log_q = log_softmax(logits), log_softmax(again)
        divergence, _ = found[key]
        assert recorded[key] == (len(follows), None)
        assert divergence.positions == len(follows)
        assert divergence.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=5e-3)
        assert divergence.top1 == (log_p.argmax(-1) == log_q.argmax(-1)).mean()


def test_more_positions_than_one_decode_gives(engine: Callable[..., Engine], tmp_path: Path) -> None:
    together = engine(write_bigram(tmp_path / "m.gguf", {"<answer>": "la", "la": "la"}))
    record = tmp_path / "record"
    list(together.record(items(["x"] * 6), lambda: None, max_tokens=50, file=record))
    found = [divergence for divergence, _ in reread(together, record).values()]
    assert [(divergence.positions, divergence.top1) for divergence in found] == [(50, 1.0)] * 6
    assert max(divergence.kl for divergence in found) < 1e-6


def reread(engine: Engine, record: Path) -> dict[int, tuple[Any, str | None]]:
    return {key: (divergence, told) for key, divergence, told in engine.diverge(record, lambda: None)}


def test_continuations_are_greedy_and_tell_their_tokens(engine: Callable[..., Engine], tmp_path: Path) -> None:
    file = write_random(tmp_path / "m.gguf", "llama", context=1024)
    plain = Plain(file)
    found = dict(engine(file).continuations(items(TEXTS), lambda: None, max_tokens=9))
    same = 0
    for key, text in enumerate(TEXTS):
        continued, (follows, _) = found[key], plain.logits(plain.tokens(rendered(text)), 9)
        kept = [token for token in follows if not lib.llama_vocab_is_eog(plain.vocab, token)]
        assert continued.prompt == tuple(plain.tokens(rendered(text)))
        assert continued.text == plain.text(continued.answer)
        assert (continued.error, continued.stop) == (None, "end" if len(continued.answer) < 9 else "length")
        same += continued.answer == tuple(kept)
    assert same >= len(TEXTS) - 1  # see `agree`
    reasons = engine(file, template=CHAT_TEMPLATE + "<think>").continuations(items(["x"]), lambda: None, max_tokens=3)
    ((_, continued),) = reasons
    assert continued.text == "<think>" + plain.text(continued.answer)


def test_a_record_of_another_vocabulary_or_a_broken_one_is_refused(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    record = tmp_path / "record"
    for name, follow, kind in (("a", "yes", None), ("b", "no", "unsupported")):
        together = engine(write_bigram(tmp_path / f"{name}.gguf", {"<answer>": follow}))
        if kind is None:
            list(together.record(items(["x"]), lambda: None, max_tokens=4, file=record))
            assert reread(together, record)[0][0].top1 == 1.0
            continue
        with pytest.raises(EngineError) as caught:
            list(together.diverge(record, lambda: None))
        assert caught.value.kind == kind
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(EngineError, match="can't be read"):
        list(together.diverge(record, lambda: None))
    with pytest.raises(EngineError) as caught:
        list(together.record(items(["x"]), lambda: None, max_tokens=4, file=tmp_path / "none" / "record"))
    assert caught.value.kind == "unwritable"


def test_the_vocabulary_is_told_as_the_file_has_it(engine: Callable[..., Engine], tmp_path: Path) -> None:
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "grün", "a": " b"})
    field = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"]
    texts = [bytes(field.parts[index]) for index in field.data]
    model = engine(file).model
    assert model.vocabulary() == hashlib.sha256(b"".join(len(t).to_bytes(4, "little") + t for t in texts)).hexdigest()
    pieces = model.pieces()
    assert pieces[259:] == [text.decode() for text in texts[259:]]
    assert pieces[3 + ord("A")] == "A"
    assert len(pieces) == model.n_vocab == len(texts)


def test_a_given_template_stands_in_for_the_models_own(engine: Callable[..., Engine], tmp_path: Path) -> None:
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "own", "<other>": "given"})
    assert answers(engine(file), ["x"])[0].text == "own"
    assert answers(engine(file, template="{{ bos_token }}<other>"), ["x"])[0].text == "given"
    bare = write_bigram(tmp_path / "bare.gguf", {"<answer>": "own"}, template=None)
    assert answers(engine(bare, template=BIGRAM_TEMPLATE), ["x"])[0].text == "own"
