"""ROUGE-L and the stemmer against `rouge_score` and NLTK, word by word."""

import random

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

from distributed_unlearn.evaluation.metrics.rouge import cut_at_blank_line, rouge_l, rouge_l_f1s, rouge_l_recalls
from distributed_unlearn.evaluation.metrics.stemming import stem

TEXTS = [
    "The full name of the author born in Kuwait City is Basil Mahfouz Al-Kuwaiti.",
    "Basil Mahfouz, an author, was born in the city of Kuwait on 08/09/1956!",
    "Her relational, conditional and radically hopeful novels were being translated, flies and dying skies included.",
    "Nothing in common whatsoever",
    "naïve café, 東京",
    "東京",
    "",
]
SUFFIXES = """s es ies sses ss ed eed ied ing ying ational tional enci anci izer bli abli alli entli eli ousli ization
ation ator alism iveness fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance
ence er ic able ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize e ll y ly tting bbed lling
ssed""".split()
STEMS = "a b i y th tr syz by toy yy tree oat trouble private ivy hop fall fizz fil hiss geo theo ag rel x9".split()


def test_stems_are_those_of_nltk():
    theirs = PorterStemmer()
    generator = random.Random(0)
    made = ["".join(generator.choices("aeioubcdlstyz", k=generator.randint(1, 9))) for _ in range(3000)]
    words = [beginning + suffix for beginning in STEMS + made for suffix in ("", *generator.sample(SUFFIXES, 12))]
    words += [
        word for word in ("sky skies dying lying tying news innings howe proceed exceed succeed died spied").split()
    ]
    words += [beginning + suffix for beginning in STEMS for suffix in SUFFIXES]
    wrong = {word: (stem(word), theirs.stem(word)) for word in words if stem(word) != theirs.stem(word)}
    assert not wrong


@pytest.mark.parametrize("reference", TEXTS)
def test_rouge_l_is_that_of_rouge_score(reference):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for candidate in TEXTS:
        found, expected = rouge_l(reference, candidate), scorer.score(reference, candidate)["rougeL"]
        assert (found.precision, found.recall, found.f1) == pytest.approx(
            (expected.precision, expected.recall, expected.fmeasure), abs=1e-12
        )


def test_recall_does_not_mind_what_is_added_and_f1_does():
    assert rouge_l_recalls(["one two"], ["zero one two three"]).tolist() == [1.0]
    assert rouge_l_f1s(["one two"], ["zero one two three"]) == pytest.approx([2 / 3])


def test_an_answer_ends_at_a_blank_line():
    assert cut_at_blank_line(" Paris.\n\nQuestion: where?") == "Paris." and cut_at_blank_line("Paris.") == "Paris."
