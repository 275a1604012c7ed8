"""Tiny checkpoints and a corpus of random tokens: what the ranks open."""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distributed_unlearn.data.encoding import EncodedCorpus
from tests.families import FAMILIES, VOCABULARY, tiny_model

NUM_RECORDS = 14
FORGET = np.arange(0, 5)
RETAIN = np.arange(5, NUM_RECORDS)


def odd_llama() -> PreTrainedModel:
    """Tied, grouped queries, and sizes that divide by neither 2 nor 4; a norm of 9 leaves rank 3 of 4 nothing."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=9,
        intermediate_size=13,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.get_input_embeddings().weight[0] = 0.4  # the frozen row, which transformers leaves at zero
    return model.eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_checkpoints(folder: Path) -> None:
    """`odd_llama`, `odd_llama_bf16`, `gemma`, the families, and what must be refused."""
    for name, model in {"odd_llama": odd_llama(), **{family: tiny_model(family) for family in FAMILIES}}.items():
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    odd_llama().to(torch.bfloat16).save_pretrained(folder / "odd_llama_bf16")
    word_tokenizer().save_pretrained(folder / "odd_llama_bf16")
    odd_llama().save_pretrained(folder / "nan")
    weights = load_file(folder / "nan" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = float("nan")  # on the last rank
    save_file(weights, folder / "nan" / "model.safetensors", metadata={"format": "pt"})
    odd_llama().save_pretrained(folder / "lacking")
    weights = load_file(folder / "lacking" / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, folder / "lacking" / "model.safetensors", metadata={"format": "pt"})
    odd_llama().save_pretrained(folder / "cut off")
    with (folder / "cut off" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    odd_llama().config.save_pretrained(folder / "pickled")
    torch.save(odd_llama().state_dict(), folder / "pickled" / "pytorch_model.bin")
    _blockless().save_pretrained(folder / "blockless")
    _write_adapter(folder, "odd_llama", "lora")
    _write_adapter(folder, "odd_llama_bf16", "lora_bf16")
    odd_llama().to(torch.float16).save_pretrained(folder / "odd_llama_fp16")
    word_tokenizer().save_pretrained(folder / "odd_llama_fp16")


def _write_adapter(folder: Path, base: str, name: str) -> None:
    """LoRA of rank 3 on some layers, A and B far from zero, with a dropout that must not be seen."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = AutoModelForCausalLM.from_pretrained(folder / base)
        settings = LoraConfig(
            r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.3
        )
        get_peft_model(model, settings).save_pretrained(folder / name)


def _blockless() -> PreTrainedModel:
    """BioGPT names no module that must not be split."""
    config = AutoConfig.for_model(
        "biogpt",
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


def random_corpus(seed: int = 5) -> EncodedCorpus:
    """Records of 5 to 14 tokens; the pad token occurs as an ordinary one."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 15, NUM_RECORDS)
    tokens = generator.integers(0, VOCABULARY, lengths.sum(), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens[offsets[:-1] + 1] = 0
    return EncodedCorpus(
        tokens=tokens,
        offsets=offsets,
        prompt_lengths=generator.integers(1, 4, NUM_RECORDS).astype(np.int32),
        record_ids=tuple(f"record-{index}" for index in range(NUM_RECORDS)),
        subject_ids=(None,) * NUM_RECORDS,
        pad_token_id=0,
    )
