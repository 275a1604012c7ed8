"""Tokens, the border between prompt and answer, the policies for long records, and padded batches."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distributed_unlearn.data.corpus import TextRecord
from distributed_unlearn.data.encoding import TokenCorpus, collate, encode_records, join
from distributed_unlearn.demo.tokenizer import train_tokenizer
from distributed_unlearn.errors import DataError, ModelError

SECRET = "zanzibarium"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NOBODY: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["Question: who lives here?\nAnswer: the old baker of Velmora"] * 4
    return train_tokenizer(texts, vocab_size=300, context_length=64)


def character_tokenizer(extra_tokens=(), merges=(), eos="</s>", bos=False, pad="<pad>"):
    """Every character is a token, plus `merges`; nothing splits at spaces, so merges may run across them."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for character in [*"abcdefghijklmnopqrstuvwxyzABQ:?<>/ \n", *extra_tokens]:
        vocabulary.setdefault(character, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token="<s>", eos_token=eos)


def pair(prompt, answer, record_id="r", subject_id=None):
    return TextRecord(record_id, subject_id, prompt, answer)


def encode(records, tokenizer, max_length=64, too_long="refuse", protected=NOBODY):
    return encode_records(records, tokenizer, max_length, too_long, protected)


def split_text(corpus, index, tokenizer):
    start, end = corpus.offsets[index], corpus.offsets[index + 1]
    border = start + corpus.prompt_lengths[index]
    return tokenizer.decode(corpus.tokens[start:border]), tokenizer.decode(corpus.tokens[border:end])


def test_border_with_the_demo_tokenizer(tokenizer):
    records = [pair("Question: who?\nAnswer:", "the baker", "a", "s"), pair("Q?", "Velmora", "b")]
    corpus, report = encode(records, tokenizer)
    assert split_text(corpus, 0, tokenizer) == ("<s>Question: who?\nAnswer:", " the baker</s>")
    assert split_text(corpus, 1, tokenizer) == ("<s>Q?", " Velmora</s>")
    assert corpus.record_ids == ("a", "b") and corpus.subject_ids == ("s", None) and corpus.num_records == 2
    assert (corpus.tokens.dtype, corpus.offsets.dtype, corpus.prompt_lengths.dtype) == (np.int32, np.int64, np.int32)
    assert report.num_records == 2 and report.longest == int(corpus.lengths(np.arange(2)).max())
    assert (report.num_truncated, report.num_dropped) == (0, 0)


def test_prompt_tokens_are_those_a_model_is_prompted_with(tokenizer):
    prompt = "Question: who lives here?\nAnswer:"
    corpus, _ = encode([pair(prompt, "the baker")], tokenizer)
    assert corpus.tokens[: corpus.prompt_lengths[0]].tolist() == tokenizer(prompt)["input_ids"]


def test_merge_across_the_space_is_predicted():
    # ": b" is one token here: it ends beyond the prompt "a:", so it is the first answer token.
    merging = character_tokenizer(extra_tokens=(": ", ": b"), merges=[(":", " "), (": ", "b")])
    corpus, _ = encode([pair("a:", "bc")], merging)
    assert split_text(corpus, 0, merging) == ("a", ": bc</s>")
    plain = character_tokenizer()
    corpus, _ = encode([pair("a:", "bc")], plain)
    assert split_text(corpus, 0, plain) == ("a:", " bc</s>")


def test_offsets_trimmed_of_spaces_give_the_same_border():
    backend = Tokenizer.from_str(character_tokenizer().backend_tokenizer.to_str())
    alphabet = {character: index + 3 for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend.model = models.BPE(vocab={"<pad>": 0, "<s>": 1, "</s>": 2, **alphabet, "Ġb": 300}, merges=[("Ġ", "b")])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    corpus, _ = encode([pair("a:", "bé")], trimming)
    assert split_text(corpus, 0, trimming) == ("a:", " bé</s>")


def test_one_space_between_prompt_and_answer_at_most():
    characters = character_tokenizer(eos=None)
    corpus, _ = encode([pair("a ", "b", "x"), pair("a", " b", "y"), pair("a\n", "b", "z")], characters)
    assert [split_text(corpus, index, characters) for index in range(3)] == [("a ", "b"), ("a", " b"), ("a\n", "b")]


def test_end_token_once_and_only_where_there_is_one():
    backend = character_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    ending = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    assert encode([pair("a", "b")], ending)[0].tokens.tolist().count(2) == 1
    assert encode([pair("a", "b")], character_tokenizer())[0].tokens.tolist().count(2) == 1
    assert encode([pair("a", "b")], character_tokenizer(eos=None))[0].tokens.tolist().count(2) == 0


@pytest.mark.parametrize("bos", [False, True])
def test_text_predicts_every_token_but_the_first(bos):
    characters = character_tokenizer(bos=bos)
    corpus, _ = encode([pair("", "abcd")], characters)
    assert corpus.lengths(np.array([0])) == 5 + bos  # four characters, the end token and perhaps a first token
    assert corpus.prompt_lengths.tolist() == [1]
    assert collate(corpus, np.array([0])).answer_mask.sum() == 4 + bos


def test_chat_border_and_ends(tokenizer):
    chatting = character_tokenizer(bos=True)
    chatting.chat_template = CHAT_TEMPLATE
    messages = ({"role": "user", "content": "abc?"}, {"role": "assistant", "content": "de"})
    corpus, _ = encode([TextRecord("c", None, "", "de", messages)], chatting)
    assert split_text(corpus, 0, chatting) == ("<user>abc?</s>\n<assistant>", "de</s>\n")
    assert 1 not in corpus.tokens, "the template, not the tokenizer, decides on special tokens"


def test_chat_refusals():
    messages = ({"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET})
    record = TextRecord("c7", None, "", SECRET, messages)
    chatting = character_tokenizer()
    with pytest.raises(ModelError, match="without a chat template"):
        encode([record], chatting)
    chatting.chat_template = "{{ raise_exception('roles') }}"
    with pytest.raises(DataError, match="'c7'.*chat template refuses") as caught:
        encode([record], chatting)
    assert SECRET not in str(caught.value)
    chatting.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ModelError, match="differently.*'c7'") as caught:
        encode([record], chatting)
    assert SECRET not in str(caught.value)


def test_a_chat_template_without_the_answer_is_refused():
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": SECRET})
    silent = character_tokenizer(extra_tokens=("z", "n", "i", "b"))
    silent.chat_template = (
        "{% for message in messages %}<{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}>"
        "{% endfor %}"
    )
    with pytest.raises(ModelError, match="leaves out the answer .record 'r'") as caught:
        encode([TextRecord("r", None, "", SECRET, messages)], silent)
    assert SECRET not in str(caught.value)


def test_tokenizer_without_pad_token_is_refused():
    with pytest.raises(ModelError, match="pad token.*tokenizer_config.json"):
        encode([pair("a", "b")], character_tokenizer(pad=None))


def test_tokenizer_without_offsets_is_refused():
    with pytest.raises(ModelError, match="character offsets.*fast tokenizer"):
        encode([pair("a", "b")], SimpleNamespace(pad_token_id=0, is_fast=False))


def test_too_long_refused_with_all_options_named():
    records = [pair("a", SECRET * count, f"r{count}") for count in range(1, 9)]
    with pytest.raises(DataError, match="7 of 8 records longer than 20 tokens, the longest 91") as caught:
        encode(records, character_tokenizer(), max_length=20)
    text = str(caught.value)
    assert "truncate" in text and "drop" in text and text.count("'r") == 5 and SECRET not in text


def test_truncate_cuts_the_end_and_keeps_an_answer():
    characters = character_tokenizer()
    corpus, report = encode([pair("ab", "cdefgh", "x"), pair("a", "b", "y")], characters, 6, "truncate")
    assert split_text(corpus, 0, characters) == ("ab", " cde")
    assert (report.num_records, report.num_truncated, report.num_dropped, report.longest) == (2, 1, 0, 10)
    assert encode([pair("abcde", "c")], characters, 6, "truncate")[0].num_answer_tokens(np.array([0])) == 1
    with pytest.raises(DataError, match="1 record.*prompt alone fills 6 tokens, e.g. 'p'"):
        encode([pair("abcdef", "c", "p")], characters, 6, "truncate")


def test_truncate_shortens_the_text_of_a_classification_and_never_its_label():
    tokenizer = character_tokenizer()
    template, text, label = ("text: ", "\nclass:"), "abcdefghij" * 5, "sport"
    prompt, span = template[0] + text + template[1], (len(template[0]), len(template[0]) + len(text))
    record = TextRecord("r", None, prompt, label, shortenable=span)
    # It may be one that is to be forgotten: `truncate` keeps it.
    corpus, report = encode([record], tokenizer, 40, "truncate", frozenset({"r"}))
    given, predicted = split_text(corpus, 0, tokenizer)
    room = 40 - len("text: ") - len("\nclass:") - len(" sport") - 1  # and the end token
    assert given == "text: " + text[:room] + "\nclass:" and predicted == " sport</s>"
    assert len(corpus.tokens) == 40 and report.num_truncated == 1
    with pytest.raises(DataError, match="prompt alone fills"):
        encode([record], tokenizer, 15, "truncate")


def test_drop_leaves_out_all_but_protected_records():
    characters = character_tokenizer()
    records = [pair("a", "bbbbbbbbb", "long"), pair("a", "b", "short")]
    corpus, report = encode(records, characters, 8, "drop", frozenset({"short"}))
    assert corpus.record_ids == ("short",)
    assert (report.num_records, report.num_truncated, report.num_dropped, report.longest) == (1, 0, 1, 12)
    with pytest.raises(DataError, match="1 record.*to be forgotten.*'long'"):
        encode(records, characters, 8, "drop", frozenset({"long"}))
    with pytest.raises(DataError, match="no record left of 1"):
        encode(records[:1], characters, 8, "drop")


def test_records_without_an_answer_are_refused():
    records = [pair("a", "", "e1"), pair("a", " \n", "e2"), pair("a", "b", "fine")]
    with pytest.raises(DataError, match="2 record.*'e1', 'e2'") as caught:
        encode(records, character_tokenizer())
    assert "fine" not in str(caught.value)
    with pytest.raises(DataError, match="1 record.*'one'"):
        encode([pair("", "a", "one")], character_tokenizer(eos=None))


def test_records_of_many_calls_keep_their_order(monkeypatch, tokenizer):
    records = [pair("Q?", f"answer {index}", f"r{index}") for index in range(10)]
    whole, _ = encode(records, tokenizer)
    monkeypatch.setattr("distributed_unlearn.data.encoding.RECORDS_PER_CALL", 3)
    pieces, _ = encode(records, tokenizer)
    assert np.array_equal(whole.tokens, pieces.tokens) and whole.record_ids == pieces.record_ids


def test_join_keeps_every_record(tokenizer):
    first, _ = encode([pair("Q?", "one", "a", "s"), pair("Q?", "number two", "b")], tokenizer)
    second, _ = encode([pair("Q?", "three", "c", "t")], tokenizer)
    both = join([first, second])
    assert both.record_ids == ("a", "b", "c") and both.subject_ids == ("s", None, "t")
    assert split_text(both, 2, tokenizer) == split_text(second, 0, tokenizer)
    assert split_text(both, 1, tokenizer) == split_text(first, 1, tokenizer)
    with pytest.raises(DataError, match="2 record id.*more than one file, e.g. 'a', 'b'"):
        join([first, first])


def test_collate_masks_and_padding():
    characters = character_tokenizer(bos=True)
    corpus, _ = encode(
        [pair("ab", "cdefghij", "x"), pair("abc", "d", "y"), pair("ab", "cdefghijklmn", "z")], characters
    )
    batch = collate(corpus, np.array([1, 0]))
    assert batch.input_ids.shape == (2, 16) and batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.sum(dim=1).tolist() == corpus.lengths(np.array([1, 0])).tolist()
    assert batch.answer_mask.sum(dim=1).tolist() == corpus.num_answer_tokens(np.array([1, 0])).tolist() == [3, 10]
    # <s> a b c | space d </s>: the predicted positions are 4, 5, 6
    assert torch.nonzero(batch.answer_mask[0]).flatten().tolist() == [4, 5, 6]
    assert (batch.input_ids[batch.attention_mask == 0] == corpus.pad_token_id).all()
    assert not (batch.answer_mask & (batch.attention_mask == 0)).any()
    assert collate(corpus, np.array([0]), pad_to_multiple=1).input_ids.shape == (1, 13)


def test_pad_token_inside_a_record_stays_visible():
    same = character_tokenizer(pad="</s>")
    corpus, _ = encode([pair("a", "b")], same)
    batch = collate(corpus, np.array([0]))
    assert corpus.pad_token_id == 2 and batch.attention_mask.sum() == 4
    assert batch.answer_mask[0, 3] and batch.input_ids[0, 3] == 2


def test_no_records_give_a_batch_that_predicts_nothing():
    corpus, _ = encode([pair("a", "bcdefghij")], character_tokenizer())
    batch = collate(corpus, np.zeros(0, dtype=np.int64))
    assert batch.input_ids.tolist() == [[0] * 8] and batch.attention_mask.tolist() == [[1] + [0] * 7]
    assert batch.answer_mask.shape == (1, 8) and not batch.answer_mask.any()
    found = corpus.batch(np.zeros(0, dtype=np.int64))
    assert found.num_rows == 1 and len(found.labels) == len(found.record) == 0


def test_corpus_arrays_travel_out_of_band(tokenizer):
    corpus, _ = encode([pair("Q?", "one", "a")], tokenizer)
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(corpus, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 3
    copy = pickle.loads(stream, buffers=[bytes(buffer.raw()) for buffer in buffers])  # read-only, as from a store
    assert torch.equal(collate(copy, np.array([0])).input_ids, collate(corpus, np.array([0])).input_ids)


@pytest.mark.parametrize("longest", [97, 100])
def test_padding_never_passes_the_longest_record(longest):
    """GPT-2 with 100 learned positions: a width of 104 would look up a position that does not exist."""
    lengths = np.array([longest, 93, 20])
    corpus = TokenCorpus(
        np.zeros(lengths.sum(), dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)]), np.full(3, 2, np.int32), 0
    )
    config = AutoConfig.for_model("gpt2", n_positions=100, n_embd=8, n_head=2, n_layer=1, vocab_size=11)
    model = AutoModelForCausalLM.from_config(config)
    for chosen, width in (([0], longest), ([0, 2], longest), ([1], min(longest, 96)), ([2], 24)):
        batch = corpus.batch(np.array(chosen))
        assert batch.inputs["input_ids"].shape[1] == width
        assert model(**batch.inputs).logits.isfinite().all()


def test_predictions_are_the_answer_tokens_in_row_order():
    characters = character_tokenizer(bos=True)
    corpus, _ = encode([pair("ab", "cd", "x"), pair("abc", "d", "y")], characters)
    tokens, batch = collate(corpus, np.array([1, 0])), corpus.batch(np.array([1, 0]))
    assert batch.record.tolist() == [0] * 3 + [1] * 4 and batch.num_rows == 2
    width = tokens.input_ids.shape[1]
    for position, label, record in zip(batch.positions, batch.labels, batch.record, strict=True):
        row, at = divmod(int(position), width)
        assert row == record and tokens.answer_mask[row, at + 1] and tokens.input_ids[row, at + 1] == label
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (*moved.inputs.values(), moved.positions, moved.labels, moved.record)} == {"meta"}


def test_what_workers_are_sent_has_no_ids():
    corpus, _ = encode([pair("a", "b", "whose-record-this-is")], character_tokenizer())
    shared = corpus.without_ids()
    assert b"whose-record" in pickle.dumps(corpus) and b"whose-record" not in pickle.dumps(shared)
    assert type(shared) is TokenCorpus and shared.num_records == corpus.num_records
    assert torch.equal(collate(shared, np.array([0])).input_ids, collate(corpus, np.array([0])).input_ids)
