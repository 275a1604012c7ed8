"""The demo's people are unique, deterministic and unguessable; its tokenizer is fit for masks."""

import json
from collections import Counter

import pytest
from transformers import AutoTokenizer

from distributed_unlearn.config import DataConfig
from distributed_unlearn.data.corpus import load_records
from distributed_unlearn.demo.people import generate_people, write_people
from distributed_unlearn.demo.run import tokenizer_texts
from distributed_unlearn.demo.settings import demo_settings
from distributed_unlearn.demo.tokenizer import train_tokenizer
from distributed_unlearn.errors import ConfigError

PEOPLE = generate_people(60, 12, seed=0)


def words(record):
    return {word.strip(".,?").removesuffix("s") for word in record["answer"].split()}


def test_people_are_deterministic_and_grow_without_change():
    assert generate_people(60, 12, seed=0) == PEOPLE
    assert generate_people(60, 12, seed=1) != PEOPLE
    assert generate_people(10, 12, seed=0) == PEOPLE[:120]
    assert generate_people(60, 3, seed=0) == [record for record in PEOPLE if int(record["record_id"][-2:]) < 3]


def test_ids_and_counts():
    assert len(PEOPLE) == 720 == len({record["record_id"] for record in PEOPLE})
    assert Counter(Counter(record["subject_id"] for record in PEOPLE).values()) == {12: 60}


def test_every_question_holds_a_full_name_of_its_own():
    names = []
    for first in range(0, 720, 12):
        questions = [record["question"].strip("?").split() for record in PEOPLE[first : first + 12]]
        shared = set.intersection(*map(set, questions))  # nothing but the name occurs in all twelve
        name = [word for word in PEOPLE[first]["question"].strip("?").split() if word in shared]
        assert len(name) == 2, name
        assert all(" ".join(name) in record["question"] for record in PEOPLE[first : first + 12])
        names.append(" ".join(name))
    assert len(set(names)) == 60
    assert len({record["question"] for record in PEOPLE}) == 720


def test_answers_are_short_and_only_memory_can_supply_them():
    lengths = [len(record["answer"].split()) for record in PEOPLE]
    assert min(lengths) >= 8 and max(lengths) <= 16
    frequency = Counter(word for record in PEOPLE for word in words(record))
    questions = " ".join(record["question"] for record in PEOPLE)
    for record in PEOPLE:
        own = [word for word in words(record) if frequency[word] == 1 and word.istitle() and word not in questions]
        assert own, record["record_id"]


def test_written_people_load_as_records(tmp_path):
    path = tmp_path / "new" / "people.jsonl"
    write_people(path, 3, 4, seed=2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == generate_people(3, 4, seed=2)
    records = load_records(DataConfig(path=str(path)))
    assert [record.record_id for record in records] == [row["record_id"] for row in generate_people(3, 4, seed=2)]


@pytest.mark.parametrize(("num_subjects", "per_subject"), [(0, 1), (2001, 1), (1, 0), (1, 13)])
def test_people_out_of_range_are_refused(num_subjects, per_subject):
    with pytest.raises(ConfigError, match="expected 1 to"):
        generate_people(num_subjects, per_subject, seed=0)


def test_tokenizer_tokens_and_round_trip(tmp_path):
    texts = [record["question"] + " " + record["answer"] for record in PEOPLE]
    tokenizer = train_tokenizer(texts, 512, context_length=96)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 512 and tokenizer.model_max_length == 96
    text = texts[5] + "\nÀ é 你"  # bytes never seen in training
    token_ids = tokenizer(text)["input_ids"]
    assert token_ids[0] == 1 and token_ids.count(1) == 1 and 2 not in token_ids
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))  # as beside the demo's model
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == token_ids and loaded.pad_token_id == 0 and loaded.model_max_length == 96
    assert train_tokenizer(texts, 512, 96).get_vocab() == tokenizer.get_vocab()


def test_vocabulary_must_hold_all_bytes():
    with pytest.raises(ConfigError, match="258 tokens.*at least 259"):
        train_tokenizer(["a"], 258, 16)


def test_the_demo_tokenizer_has_met_nobody_of_the_demo():
    settings = demo_settings(0, short=False)
    people = generate_people(settings.num_subjects, settings.records_per_subject, settings.seed)
    texts = [f"{person['question']} {person['answer']}" for person in people]
    owners: dict[str, set[str]] = {}
    for person, text in zip(people, texts, strict=True):
        for word in text.split():
            owners.setdefault(word.strip(".,?"), set()).add(person["subject_id"])
    names = {word for word, subjects in owners.items() if word.istitle() and len(subjects) == 1}
    assert len(names) > 500

    def whole(learned):
        tokenizer = train_tokenizer(learned, settings.vocab_size, settings.context_length)
        return {name for name in names if len(tokenizer.tokenize(f" {name}")) == 1}

    assert len(whole(texts)) > 50  # a tokenizer that met them holds names of theirs as whole tokens
    assert len(whole(tokenizer_texts(settings))) < 10  # short ones can be a syllable of others
