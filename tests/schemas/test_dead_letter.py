"""Marks, letter ids, replay jobs, and the position that a returned record brings along."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.dead_letter import Mark, letter_id, mark_headers, read_letter_id, read_mark, replay_job
from schemas.wire import read_origin, returned_headers

PARTITIONS = st.integers(0, 10**6)
OFFSETS = st.integers(0, 10**17)
INGRESS = "headgate.default.ingress"


@given(st.sampled_from(["replayed", "dropped"]), PARTITIONS, OFFSETS, st.text(max_size=30))
def test_a_mark_is_read_as_it_was_written(kind, partition: int, offset: int, job: str) -> None:
    mark = Mark(kind, partition, offset, job)
    assert read_mark(dict(mark_headers(mark))) == mark


@pytest.mark.parametrize("spoilt", ["hg-mark", "hg-letter"])
def test_what_is_no_mark_marks_nothing(spoilt: str) -> None:
    headers = dict(mark_headers(Mark("replayed", 2, 17, "j")))
    assert read_mark(headers) is not None
    assert read_mark({**headers, spoilt: b"other"}) is None
    assert read_mark({name: value for name, value in headers.items() if name != spoilt}) is None


@given(PARTITIONS, OFFSETS)
def test_a_letter_id_names_one_place(partition: int, offset: int) -> None:
    assert read_letter_id(letter_id(partition, offset)) == (partition, offset)


@pytest.mark.parametrize("text", ["", "2", "2/", "/17", "2/-1", "2/1/7", "a/b", "2/" + "9" * 30])
def test_other_texts_are_no_letter_id(text: str) -> None:
    assert read_letter_id(text) is None


@given(st.sets(st.tuples(st.sampled_from(["0a1b2c3d", "0a1b2c3e"]), PARTITIONS, OFFSETS), min_size=2, max_size=20))
def test_each_letter_has_its_own_job_which_every_replay_of_it_shares(letters: set[tuple[str, int, int]]) -> None:
    jobs = {replay_job(*letter) for letter in letters}
    assert len(jobs) == len(letters)
    assert jobs == {replay_job(*letter) for letter in letters}


def test_an_unrouted_record_goes_back_with_its_own_headers_and_its_first_position() -> None:
    own = [("trace", b"\xff"), ("trace", b"2"), ("empty", None)]
    ours = [("hg-v", b"1"), ("hg-error", b"malformed"), ("hg-origin", b"headgate.default.ingress/3/42")]
    returned = returned_headers([*own, *ours])
    assert returned == [*own, ours[-1]]
    assert read_origin(returned, INGRESS) == (3, 42)
    assert returned_headers(own) is None


@pytest.mark.parametrize(
    "origin",
    [b"", b"headgate.default.ingress", b"headgate.default.ingress/3", b"other.ingress/3/42", b"\xff/3/42",
     b"headgate.default.ingress/3/-1", b"headgate.default.ingress/x/1", b"headgate.default.ingress/1/" + b"9" * 30],
)  # fmt: skip
def test_a_position_elsewhere_or_of_another_form_is_none(origin: bytes) -> None:
    assert read_origin([("hg-origin", b"headgate.default.ingress/3/42")], INGRESS) == (3, 42)  # the control
    assert read_origin([("hg-origin", origin)], INGRESS) is None
