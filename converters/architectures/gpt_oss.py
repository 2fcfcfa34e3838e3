"""gpt-oss: experts stored transposed, gate's and up's rows in turns, attention with sinks, biases everywhere.

The packed form of the published checkpoints (MXFP4, `_blocks` and `_scales`) has no rule: adapters need none, and as a
reference the GGUF file of the same model does.
"""

from converters.architectures.decoder import attention, embeddings, norms, router, switch_experts
from converters.architectures.table import Architecture, Rule
from converters.architectures.transforms import StoredTransposed, TakeRows

_LAYER = "model.layers.{i}."
_EXPERTS = _LAYER + "mlp.experts"


def _parts(name: str) -> tuple[Rule, ...]:
    """Gate's and up's weights of the parameter, and their biases."""
    parts = (("gate", TakeRows("even")), ("up", TakeRows("odd")))
    weights = (
        Rule(f"{_EXPERTS}.{name}", f"blk.{{i}}.ffn_{kind}_exps", (StoredTransposed(), rows), bare="weight",
             stacked=True, parameter=True) for kind, rows in parts
    )  # fmt: skip
    biases = (
        Rule(f"{_EXPERTS}.{name}_bias", f"blk.{{i}}.ffn_{kind}_exps", (rows,), one_way=True, bare="bias", stacked=True)
        for kind, rows in parts
    )
    return (*weights, *biases)


GPT_OSS = Architecture(
    name="gpt-oss",
    classes=("GptOssForCausalLM",),
    rules=(
        *embeddings(),
        *attention(),
        Rule(_LAYER + "self_attn.sinks", "blk.{i}.attn_sinks", bare="weight"),
        *_parts("gate_up_proj"),
        Rule(f"{_EXPERTS}.down_proj", "blk.{i}.ffn_down_exps", (StoredTransposed(),), bare="weight", stacked=True,
             parameter=True),
        Rule(f"{_EXPERTS}.down_proj_bias", "blk.{i}.ffn_down_exps", one_way=True, bare="bias", stacked=True),
        *switch_experts(_EXPERTS)[:2],  # mlx-lm's third is called as the parameter is
        router(_LAYER + "mlp.router"),
        *norms(
            {
                "model.norm": "output_norm",
                _LAYER + "input_layernorm": "blk.{i}.attn_norm",
                _LAYER + "post_attention_layernorm": "blk.{i}.post_attention_norm",
            }
        ),
    ),
)  # fmt: skip
