"""DeepSeek 2 and 3: keys and values from one latent vector, experts beside a shared one, dense first layers.

llama.cpp multiplies most of its attention's weights without looking for adapters (`converters.adapters.gguf_ignored`).
"""

from converters.architectures.decoder import (
    PRE_NORMS,
    embeddings,
    experts,
    feed_forward,
    norms,
    router,
    shared_expert,
)
from converters.architectures.table import Architecture, Rule
from converters.architectures.transforms import HeadParts

_ATTENTION = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp"

DEEPSEEK2 = Architecture(
    name="deepseek2",
    classes=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    rules=(
        *embeddings(),
        Rule(_ATTENTION + "q_proj", "blk.{i}.attn_q"),
        Rule(_ATTENTION + "q_a_proj", "blk.{i}.attn_q_a"),
        Rule(_ATTENTION + "q_b_proj", "blk.{i}.attn_q_b"),
        Rule(_ATTENTION + "kv_a_proj_with_mqa", "blk.{i}.attn_kv_a_mqa"),
        Rule(_ATTENTION + "kv_b_proj", "blk.{i}.attn_k_b", (HeadParts("key"),), one_way=True),
        Rule(_ATTENTION + "kv_b_proj", "blk.{i}.attn_v_b", (HeadParts("value"),), one_way=True),
        Rule(_ATTENTION + "o_proj", "blk.{i}.attn_output"),
        # Targeting modules of these names, PEFT takes them for the experts'.
        *(rule.as_parameter() for rule in (*feed_forward(), *shared_expert(f"{_MLP}.shared_experts"))),
        *experts(_MLP),
        router(f"{_MLP}.gate"),
        Rule(f"{_MLP}.gate.e_score_correction_bias", "blk.{i}.exp_probs_b", bare="bias"),
        *norms(
            {
                **PRE_NORMS,
                _ATTENTION + "q_a_layernorm": "blk.{i}.attn_q_a_norm",
                _ATTENTION + "kv_a_layernorm": "blk.{i}.attn_kv_a_norm",
            }
        ),
    ),
    without_pairs={
        _ATTENTION + "kv_b_proj": (
            "llama.cpp has attn_k_b and attn_v_b in its place, split by heads and the keys' transposed, and applies no "
            "pair to either"
        )
    },
)
