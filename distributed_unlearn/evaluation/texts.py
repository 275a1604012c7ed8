"""From tokens of records to prompts and texts, and from what a model wrote to scores; texts stay in memory."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distributed_unlearn.data.encoding import TokenCorpus
from distributed_unlearn.evaluation.metrics.rouge import cut_at_blank_line, rouge_l_f1s, rouge_l_recalls
from distributed_unlearn.models.processor import Tokenizer
from distributed_unlearn.workers.survey import TokenRows


@dataclass(frozen=True, eq=False)
class Continuations:
    """Prompts of some records, and what really follows each."""

    prompts: TokenRows
    references: tuple[str, ...]
    reference_tokens: tuple[tuple[int, ...], ...]


def answer_tokens(corpus: TokenCorpus, record: int) -> list[int]:
    """Tokens of a record's answer: from where its prompt ends, by the border that encoding found."""
    begin, end = corpus.offsets[record] + corpus.prompt_lengths[record], corpus.offsets[record + 1]
    return [int(token) for token in corpus.tokens[begin:end]]


def decoded(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of rows of tokens, without special tokens."""
    return [str(tokenizer.decode(list(row), skip_special_tokens=True)).strip() for row in rows]


def continuations(corpus: TokenCorpus, indices: np.ndarray, tokenizer: Tokenizer) -> Continuations:
    """Each record's prompt and answer; of a record without a prompt (plain text) the first half is the prompt."""
    prompts, answers = [], []
    for record in indices:
        tokens = [int(token) for token in corpus.tokens[corpus.offsets[record] : corpus.offsets[record + 1]]]
        given = int(corpus.prompt_lengths[record])
        given = max(1, len(tokens) // 2) if given == 1 else given
        prompts.append(tokens[:given])
        answers.append(tuple(tokens[given:]))
    return Continuations(TokenRows.of(prompts), tuple(decoded(tokenizer, answers)), tuple(answers))


def knowledge_prompts(
    corpus: TokenCorpus,
    indices: np.ndarray,
    examples: np.ndarray,
    tokenizer: Tokenizer,
    room: int | None,
) -> Continuations:
    """Questions after some answered ones, blank lines between them: MUSE's KnowMem.

    Args:
        corpus: Questions and answers.
        indices: Records that are asked about.
        examples: Records that are shown with their answers.
        tokenizer: The model's.
        room: Tokens that a prompt may have; examples are left out, the last ones first, until it fits. None: no limit.
    """
    shown = [" ".join(_prompt_text(corpus, int(record), tokenizer)) for record in examples]
    prompts, answers = [], []
    for record in indices:
        prompt, answer = _prompt_text(corpus, int(record), tokenizer)
        answers.append(answer)
        for count in range(len(shown), -1, -1):
            ids = tokenizer("\n\n".join([*shown[:count], prompt]), add_special_tokens=True)["input_ids"]
            ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
            if room is None or len(ids) <= room or count == 0:
                break
        prompts.append(ids)
    return Continuations(TokenRows.of(prompts), tuple(answers), ())


def _prompt_text(corpus: TokenCorpus, record: int, tokenizer: Tokenizer) -> tuple[str, str]:
    begin, given = int(corpus.offsets[record]), int(corpus.prompt_lengths[record])
    prompt = corpus.tokens[begin : begin + given].tolist()
    texts = decoded(tokenizer, [prompt, answer_tokens(corpus, record)])
    return texts[0], texts[1]


def compressed_sizes(corpus: TokenCorpus, indices: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of each answer's text compressed by zlib, int64 [n]."""
    texts = decoded(tokenizer, [answer_tokens(corpus, int(record)) for record in indices])
    return np.array([len(zlib.compress(text.encode())) for text in texts], dtype=np.int64)


def answer_scores(
    wanted: Continuations,
    written: TokenRows,
    max_new_tokens: int,
    verbatim_tokens: int,
    tokenizer: Tokenizer,
) -> dict[str, np.ndarray]:
    """`recall`: ROUGE-L recall of the first `max_new_tokens`; `verbatim`: F1 of the first tokens of both. [n] each."""
    rows = written.rows()
    recalls = rouge_l_recalls(wanted.references, decoded(tokenizer, [row[:max_new_tokens] for row in rows]))
    references = decoded(tokenizer, [row[:verbatim_tokens] for row in wanted.reference_tokens])
    f1s = rouge_l_f1s(references, decoded(tokenizer, [row[:verbatim_tokens] for row in rows]))
    return {"recall": recalls, "verbatim": f1s}


def knowledge_scores(wanted: Continuations, written: TokenRows, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """`f1`: ROUGE-L F1 of what was written before the first blank line, [n]."""
    answers = [cut_at_blank_line(text) for text in decoded(tokenizer, written.rows())]
    return {"f1": rouge_l_f1s(wanted.references, answers)}
