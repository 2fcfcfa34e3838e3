"""Directories with the tokenizers of every kind of model that is converted, and with what people do to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers_tiny import BPE_FORMS, CHAT_TEMPLATE, write_bpe, write_sentencepiece

ROWS = 560
OF_FORM = {"qwen2": "Qwen2ForCausalLM", "refact": "GraniteForCausalLM", "dbrx": "Olmo2ForCausalLM"} | {
    "gpt-4o": "Phi3ForCausalLM"
}
"""Classes of the models that have another than Llama's."""


@dataclass(frozen=True)
class Case:
    """A directory's tokenizer and the model that it is for."""

    model_class: str
    write: Callable[[Path], None]
    config: Mapping[str, Any]
    rows: int = ROWS


def spm(family: str = "llama", **options: Any) -> Callable[[Path], None]:
    return lambda directory: write_sentencepiece(directory, family=family, **options)


def bpe(pre: str, **options: Any) -> Callable[[Path], None]:
    return lambda directory: write_bpe(directory, pre, **options)


def then(write: Callable[[Path], None], *edits: Callable[[Path], None]) -> Callable[[Path], None]:
    def written(directory: Path) -> None:
        write(directory)
        for edit in edits:
            edit(directory)

    return written


def edited(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / name
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return edit


def configured(**values: Any) -> Callable[[Path], None]:
    return edited("tokenizer_config.json", lambda data: data.update(values))


def with_added(*contents: tuple[str, bool, bool]) -> Callable[[Path], None]:
    """Further added tokens (content, special, normalized), as both files list them."""

    def edit(directory: Path) -> None:
        data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        first = max(token["id"] for token in data["added_tokens"]) + 1
        for number, (content, special, normalized) in enumerate(contents, first):
            flags = {"single_word": False, "lstrip": False, "rstrip": False}
            token = {"content": content, "special": special, "normalized": normalized, **flags}
            data["added_tokens"].append({"id": number, **token})
        (directory / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        edited("tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))(directory)

    return edit


def with_file(name: str, content: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content, encoding="utf-8")

    return edit


def without(key: str) -> Callable[[Path], None]:
    return edited("tokenizer_config.json", lambda data: data.pop(key))


def ends(directory: Path) -> None:
    """A post-processor that ends every text with a token that is not eos."""

    def change(data: Any) -> None:
        first, last = data["post_processor"]["single"][0], "<|end_of_text|>"
        data["post_processor"]["single"].append({"SpecialToken": {"id": last, "type_id": 0}})
        data["post_processor"]["pair"] = [first, {"Sequence": {"id": "A", "type_id": 0}}]
        number = next(token["id"] for token in data["added_tokens"] if token["content"] == last)
        data["post_processor"]["special_tokens"][last] = {"id": last, "ids": [number], "tokens": [last]}

    edited("tokenizer.json", change)(directory)


_NAMED = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool use", "template": "{{ tools }}"}]
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
CASES: Mapping[str, Case] = {
    **{f"bpe {form}": Case(OF_FORM.get(form, "LlamaForCausalLM"), bpe(form), _IDS) for form in BPE_FORMS},
    "merges as pairs": Case("LlamaForCausalLM", bpe("llama-bpe", pairs=True), _IDS),
    "smollm3": Case("SmolLM3ForCausalLM", bpe("llama-bpe"), _IDS),
    "qwen3moe": Case("Qwen3MoeForCausalLM", bpe("qwen2"), {"eos_token_id": [5, 6], "pad_token_id": 7}),
    "spm": Case("LlamaForCausalLM", spm(), _IDS),
    "spm with tokenizer.json": Case("MistralForCausalLM", spm(tokenizer_json=True), {}),
    "spm mixtral": Case("MixtralForCausalLM", then(spm(), configured(add_prefix_space=True)), _IDS),
    "gemma": Case("GemmaForCausalLM", spm("gemma"), _IDS),
    "gemma2": Case("Gemma2ForCausalLM", spm("gemma", tokenizer_json=True), _IDS),
    "gemma3": Case("Gemma3ForCausalLM", spm("gemma"), _IDS),
    "gemma3 with images": Case("Gemma3ForConditionalGeneration", spm("gemma"), {"text_config": _IDS}),
    "phi3": Case("Phi3ForCausalLM", spm(tokenizer_json=True), _IDS),
    "phi3 with added tokens": Case(
        "Phi3ForCausalLM",
        then(spm(tokenizer_json=True), with_added(("<|user|>", True, False), ("<|tool▁|>", False, False))),
        _IDS,
    ),
    "spm with added_tokens.json": Case(
        "LlamaForCausalLM", then(spm(), with_file("added_tokens.json", '{"<pad>": 512, "<x>": 513, "far": 9999}')), {}
    ),
    "spm with added tokens": Case(
        "LlamaForCausalLM",
        then(
            spm(),
            configured(
                added_tokens_decoder={
                    "3": {"content": "<|three|>", "special": False},
                    "512": {"content": "▁two▁words", "special": False},
                    "513": {"content": "<end>", "special": True},
                    "9999": {"content": "far", "special": True},
                }
            ),
        ),
        _IDS,
    ),
    "spm longer than the embedding": Case("LlamaForCausalLM", spm(), {}, rows=500),
    "code llama": Case("LlamaForCausalLM", spm(), _IDS, rows=32016),
    "granite's 49152": Case("GraniteForCausalLM", bpe("refact"), {}, rows=49152),
    "added tokens": Case(
        "Qwen2ForCausalLM",
        then(
            bpe("qwen2"),
            with_added(
                ("<tool>", False, False),
                ("<|looks|>", False, True),
                ("Ġé", False, False),
                ("▁sp▁ace", False, True),
                ("日本", True, False),
                ("new line\n", False, False),
            ),
        ),
        {},
    ),
    "flags in tokenizer_config.json": Case(
        "Qwen2ForCausalLM",
        then(
            bpe("qwen2"),
            configured(
                added_tokens_decoder={"510": {"content": "<|im_start|>", "special": False, "normalized": False}}
            ),
        ),
        {},
    ),
    "names that are no tokens": Case(
        "Qwen2ForCausalLM",
        then(
            bpe("qwen2"),
            configured(pad_token="[PAD]", unk_token="<|im_end|>", extra_special_tokens=["<more>", "[PAD]"]),
        ),
        {},
    ),
    "texts that end": Case("LlamaForCausalLM", then(bpe("llama-bpe"), ends), _IDS),
    "no tokenizer_config.json": Case(
        "LlamaForCausalLM",
        then(bpe("llama-bpe"), lambda directory: (directory / "tokenizer_config.json").unlink()),
        _IDS,
    ),
    "named templates": Case("LlamaForCausalLM", then(bpe("llama-bpe"), configured(chat_template=_NAMED)), _IDS),
    "templates without a default": Case(
        "LlamaForCausalLM", then(bpe("llama-bpe"), configured(chat_template=_NAMED[1:])), _IDS
    ),
    "no template": Case("LlamaForCausalLM", then(bpe("llama-bpe"), without("chat_template")), _IDS),
    "chat_template.jinja": Case(
        "LlamaForCausalLM",
        then(bpe("llama-bpe"), without("chat_template"), with_file("chat_template.jinja", "{{ x }}\r\né")),
        _IDS,
    ),
    "additional templates": Case(
        "LlamaForCausalLM",
        then(
            bpe("llama-bpe"),
            without("chat_template"),
            with_file("chat_template.jinja", "{{ x }}"),
            with_file("additional_chat_templates/rag.jinja", "{{ y }}"),
        ),
        _IDS,
    ),
    "chat_template.json": Case(
        "LlamaForCausalLM",
        then(
            bpe("llama-bpe"), without("chat_template"), with_file("chat_template.json", '{"chat_template": "{{ x }}"}')
        ),
        _IDS,
    ),
    "template in two places": Case(
        "LlamaForCausalLM", then(bpe("llama-bpe"), with_file("chat_template.jinja", "{{ x }}")), _IDS
    ),
}
