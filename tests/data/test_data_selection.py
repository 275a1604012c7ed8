"""Selections resolve to the named records, partitions are disjoint, mistakes are refused."""

import numpy as np
import pytest

from distributed_unlearn.config import SelectionConfig
from distributed_unlearn.data.encoding import EncodedCorpus
from distributed_unlearn.data.selection import partition_records, resolve
from distributed_unlearn.errors import DataError


def make_corpus(num_records=10):
    """Records r0, r1, ... of two tokens each; two records a subject, the last record nobody's."""
    subjects = [f"s{index // 2}" for index in range(num_records - 1)]
    return EncodedCorpus(
        tokens=np.arange(2 * num_records, dtype=np.int32),
        offsets=np.arange(0, 2 * num_records + 1, 2, dtype=np.int64),
        prompt_lengths=np.ones(num_records, dtype=np.int32),
        record_ids=tuple(f"r{index}" for index in range(num_records)),
        subject_ids=(*subjects, None),
        pad_token_id=0,
    )


def select(*record_ids):
    return SelectionConfig(record_ids=record_ids)


def test_resolve_unites_subjects_ids_and_file(tmp_path):
    ids_file = tmp_path / "ids.txt"
    ids_file.write_text("r7\n\n  r0 \nr7\n")
    selection = SelectionConfig(subjects=("s2",), record_ids=("r9", "r4"), ids_file=str(ids_file))
    indices = resolve(selection, make_corpus())
    assert indices.tolist() == [0, 4, 5, 7, 9] and indices.dtype == np.int64


def test_unknown_names_are_counted_and_five_shown():
    selection = select("r1", *(f"unknown-{index}" for index in range(8)))
    with pytest.raises(DataError, match="8 unknown record id.*of 9.*data.id_field") as caught:
        resolve(selection, make_corpus())
    assert str(caught.value).count("unknown-") == 5
    with pytest.raises(DataError, match="1 unknown subject.*'s99'.*data.subject_field"):
        resolve(SelectionConfig(subjects=("s1", "s99")), make_corpus())


def test_ids_file_must_be_there_and_hold_ids(tmp_path):
    with pytest.raises(DataError, match="gone.txt.*FileNotFoundError.*one id a line"):
        resolve(SelectionConfig(ids_file=str(tmp_path / "gone.txt")), make_corpus())
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="without ids"):
        resolve(SelectionConfig(ids_file=str(tmp_path / "blank.txt")), make_corpus())


def test_partition_over_rounds():
    partition = partition_records(make_corpus(), [select("r0"), SelectionConfig(subjects=("s1",))], select("r9"), 10)
    assert [forget.tolist() for forget in partition.forget_rounds] == [[0], [2, 3]]
    assert partition.holdout.tolist() == [9]
    assert partition.retain(-1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert partition.retain(0).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert partition.retain(1).tolist() == [1, 4, 5, 6, 7, 8]


def test_separate_holdout_file_is_all_held_out():
    elsewhere = SelectionConfig(path="holdout.jsonl")
    partition = partition_records(make_corpus(), [select("r0")], elsewhere, 8)
    assert partition.holdout.tolist() == [8, 9] and partition.retain(0).tolist() == [1, 2, 3, 4, 5, 6, 7]
    both = SelectionConfig(path="holdout.jsonl", record_ids=("r1",))
    assert partition_records(make_corpus(), [select("r0")], both, 8).holdout.tolist() == [1, 8, 9]


def test_no_holdout_and_no_rounds():
    partition = partition_records(make_corpus(), [], None, 10)
    assert len(partition.holdout) == 0 and partition.forget_rounds == () and len(partition.retain(-1)) == 10


def test_contradictions_are_refused():
    corpus = make_corpus()
    with pytest.raises(DataError, match="1 record.*forgotten .round 1. and held out, e.g. 'r1'"):
        partition_records(corpus, [select("r0", "r1")], select("r1", "r2"), 10)
    with pytest.raises(DataError, match="1 record.*held out, e.g. 'r9'"):
        partition_records(corpus, [select("r9")], SelectionConfig(path="holdout.jsonl"), 8)
    with pytest.raises(DataError, match="1 record.*round 3 that an earlier round forgets, e.g. 'r0'"):
        partition_records(corpus, [select("r0"), select("r1"), select("r0", "r2")], None, 10)
    with pytest.raises(
        DataError, match="no record left to retain: 9 to be forgotten, 1 held out and 0 erased before of 10"
    ):
        partition_records(corpus, [select(*(f"r{index}" for index in range(9)))], select("r9"), 10)
    with pytest.raises(DataError, match="empty holdout set"):
        partition_records(corpus, [select("r0")], SelectionConfig(path="holdout.jsonl"), 10)
