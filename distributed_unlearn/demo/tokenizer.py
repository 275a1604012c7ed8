"""A small byte-level BPE tokenizer, trained on the demo's own texts."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distributed_unlearn.errors import ConfigError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
"""Three distinct tokens: a pad token that doubled as end token would hide whether masks come from lengths."""
SMALLEST_VOCABULARY = 256 + 3
"""All bytes and the three special tokens: any text can be written."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016, over bytes) that puts `<s>` before every text by itself.

    Args:
        texts: What to learn the merges from.
        vocab_size: Upper limit on the number of tokens, at least 259; few texts may give fewer.
        context_length: Tokens that the model to come can read, kept as `model_max_length`.

    Returns:
        The tokenizer; `<pad>` is 0, `<s>` 1, `</s>` 2. Nothing appends `</s>`: encoding does.

    Raises:
        ConfigError: a vocabulary too small for the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"a vocabulary of {vocab_size} tokens", f"at least {SMALLEST_VOCABULARY}", "raise the vocabulary size"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context_length,
        padding_side="right",
    )
