"""Tiny random checkpoints of causal language models, one per architecture that is meant to work."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Settings = dict[str, object]

TOKENS: Settings = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE: Settings = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
GROUPED: Settings = {**BASE, "num_key_value_heads": 2}
HEADS: Settings = {**GROUPED, "head_dim": 8}
GPT: Settings = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ROTARY: Settings = {**GPT, "n_ctx": 64, "rotary_dim": 4}
EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK: Settings = {
    **BASE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
VISION: Settings = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

DENSE: dict[str, Settings] = {
    "arcee": GROUPED,
    "codegen": ROTARY,
    "cohere": GROUPED,
    "cohere2": GROUPED,
    "exaone4": GROUPED,
    "falcon": BASE,
    "gemma": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "glm": HEADS,
    "glm4": HEADS,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {**BASE, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": BASE,
    "gptj": ROTARY,
    "granite": GROUPED,
    "helium": HEADS,
    "llama": GROUPED,
    "mamba": {**TOKENS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "mistral": GROUPED,
    "mpt": {**TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "nemotron": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED,
    "opt": {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": BASE,
    "phi": BASE,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "seed_oss": HEADS,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
}
OTHERS: dict[str, Settings] = {
    "bloom": {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "deepseek_v3": DEEPSEEK,
    "gemma3": {"text_config": HEADS, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**HEADS, **EXPERTS},
}
"""Custom autograd, mixtures of experts, a text model inside a multimodal one."""
ALL = {**DENSE, **OTHERS}


def tiny_family(name: str) -> PreTrainedModel:
    """Two layers, width 32, no parameter a constant."""
    config = AutoConfig.for_model(name, **ALL[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif parameter.dim() == 3:  # stacked experts start at zero in some architectures
                    parameter.normal_(0, 0.15)
    return model.eval()


def write_family(name: str, folder: Path) -> Path:
    """The checkpoint as `save_pretrained` writes it: with the names of published ones."""
    tiny_family(name).save_pretrained(folder / name)
    return folder / name
