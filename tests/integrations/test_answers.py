"""What batch inference on Ray does without Ray: options, records, and the folder of answers."""

import json

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("pydantic")

from twigvlm.errors import TwigVLMError  # noqa: E402
from twigvlm.integrations.answers import (  # noqa: E402
    asked,
    check_options,
    open_answers,
    read_answers,
    read_source,
    unanswered,
    write_answers,
    written_answers,
)
from twigvlm.serving.limits import Limits  # noqa: E402

FAILED = {"answer": None, "error": "no picture", "tokens": 0, "visual_tokens": 0.0}
GOOD = {"answer": "a sign", "error": None, "tokens": 3, "visual_tokens": 8.0}


def write(out, answers):
    return write_answers(out, {key: {**row, "asked": f"{key}?"} for key, row in answers.items()})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"retian": 64}, "retian: this server knows no such field"),
        ({"max_completion_tokens": 2048}, "max_completion_tokens: must be at most 1024"),
        ({"n": 9}, "n: must be 1 to 8"),
        ({"stream": True}, "stream: does not apply"),
        ({"retain": 8, "keep": 4}, "give only one of them"),
        ({"pruner": "nonsense", "retain": 8}, "nonsense"),
        ({"pruner": "visionzip:/etc", "retain": 8}, "requests cannot name directories"),
        ({"messages": []}, "messages come from the model and the records; leave them out"),
        ({"seed": {1}}, "options: cannot be written as JSON"),
    ],
)
def test_an_option_that_every_record_would_fail_for_is_refused_at_once(options, words):
    with pytest.raises(TwigVLMError, match=words):
        check_options(options, Limits())


def test_options_within_the_limits_are_taken():
    check_options({"retain": 64, "max_completion_tokens": 2048, "pruner": "fastv:2"}, Limits(max_tokens=4096))


def test_records_that_failed_are_answered_again_and_an_answer_counts_more_than_an_error(tmp_path):
    options = {"retain": 8}
    assert open_answers(tmp_path, options) == {}
    write(tmp_path, {"a": GOOD, "b": FAILED, "c": FAILED})
    assert open_answers(tmp_path, options) == {"a": "a?"}
    for ids in ("b", "bc", "cb", "ab"):  # under several names, so that files come in different orders
        write(tmp_path, {key: GOOD if key == "b" else {**FAILED, "error": "again"} for key in ids})
    assert open_answers(tmp_path, options) == {"a": "a?", "b": "b?"}
    answers = read_answers(tmp_path).to_pylist()
    assert answers[:2] == [{"id": "a", **GOOD}, {"id": "b", **GOOD}]
    assert answers[2]["id"] == "c"
    assert answers[2]["error"]


def test_answers_with_other_options_are_not_gone_on_with(tmp_path):
    open_answers(tmp_path / "out", {"retain": 8})
    open_answers(tmp_path / "out", {"retain": 16})  # nothing was answered with the first ones
    write(tmp_path / "out", {"a": GOOD})
    with pytest.raises(TwigVLMError, match=r"other options \(keep, retain\); name another directory"):
        open_answers(tmp_path / "out", {"keep": 8})
    assert open_answers(tmp_path / "out", {"retain": 16}) == {"a": "a?"}
    for note in (tmp_path / "out").glob("*.json"):
        note.write_text('{"retain":')
        with pytest.raises(TwigVLMError, match=r"its settings, .*, cannot be read; name another directory"):
            open_answers(tmp_path / "out", {"retain": 16})
        note.unlink()
    with pytest.raises(TwigVLMError, match="other options"):
        open_answers(tmp_path / "out", {"retain": 16})


def test_an_answer_belongs_to_the_question_that_was_asked(tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "one"}\n{"question": "two"}\n')
    first = read_source(tmp_path)
    done = {"0": asked("one", None)}
    assert unanswered(first, {}) == first
    assert unanswered(first, done).column("question").to_pylist() == ["two"]
    questions.write_text('{"question": "new"}\n{"question": "one"}\n{"question": "two"}\n')
    with pytest.raises(TwigVLMError, match="record '0' has changed since it was answered; name another out"):
        unanswered(read_source(tmp_path), done)
    assert len({asked("one", None), asked("one", "a.png"), asked("one", b"picture"), asked("two", None)}) == 4


def test_a_batch_that_was_written_is_not_answered_again(tmp_path):
    digests = {"a": "a?", "b": "b?"}
    assert written_answers(tmp_path, digests) is None
    written = write(tmp_path, {"a": GOOD, "b": FAILED})
    assert written_answers(tmp_path, digests) is None, "one of them failed"
    written = write(tmp_path, {"a": GOOD, "b": GOOD})
    assert written_answers(tmp_path, digests) == written
    assert written_answers(tmp_path, {"b": "b?", "a": "a?"}) == written
    assert written_answers(tmp_path, {**digests, "b": "another?"}) is None
    assert written_answers(tmp_path, {"a": "a?"}) is None


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("a", "b"):
        table = pa.table({"note": ["long"], "image": [b"picture"], "id": [name], "question": ["what?"]})
        pq.write_table(table, folder / f"{name}.parquet")
    assert read_source(folder).to_pylist() == [
        {"id": name, "question": "what?", "image": b"picture"} for name in ("a", "b")
    ]
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "less.parquet")
    with pytest.raises(TwigVLMError, match="has no column image, question; add it"):
        read_source(tmp_path / "less.parquet")


def test_a_folder_without_answers_has_none(tmp_path):
    assert len(read_answers(tmp_path)) == 0


def test_a_question_may_hold_what_unicode_takes_for_the_end_of_a_line(tmp_path):
    questions = ["one\u2028two", "three\u0085four", "five"]
    lines = [json.dumps({"question": question, "image": "a.png"}, ensure_ascii=False) for question in questions]
    (tmp_path / "questions.jsonl").write_text("\r\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    records = read_source(tmp_path).to_pylist()
    assert [record["question"] for record in records] == questions
    assert records[0]["image"] == str((tmp_path / "a.png").absolute())


def test_records_of_one_id_are_refused(tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"id": 1, "question": "a"}\n{"id": "1", "question": "b"}\n')
    with pytest.raises(TwigVLMError, match="two records with the same id"):
        read_source(tmp_path)


def test_data_uris_and_records_without_an_id_or_a_picture(tmp_path):
    records = [{"id": None, "image": "data:image/png;base64,AA"}, {"image": None}, {"id": "x", "image": "a.png"}]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"question": "a", **each}) for each in records))
    found = read_source(tmp_path)
    assert found.column("id").to_pylist() == ["0", "1", "x"]
    assert found.column("image").to_pylist() == ["data:image/png;base64,AA", None, str((tmp_path / "a.png").absolute())]
    pq.write_table(found.set_column(0, "id", [[None, "7", None]]), tmp_path / "a.parquet")
    assert read_source(tmp_path / "a.parquet").column("id").to_pylist() == ["0", "7", "2"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "What?", "image": 5}', "line 2: needs a path as `image`, or null for no image"),
        ('{"question": "What?"', "line 2: not JSON"),
        ('["What?"]', "line 2: needs an object with a text `question`"),
        ('{"image": "a.png"}', "line 2: needs an object with a text `question`"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, words):
    (tmp_path / "questions.jsonl").write_text(f'{{"question": "Where?"}}\n{line}\n')
    with pytest.raises(TwigVLMError, match=words):
        read_source(tmp_path)


def test_a_column_without_any_picture_is_one_of_texts(tmp_path):
    """Ray would make numbers of a column of Arrow's type null."""
    path = tmp_path / "records.parquet"
    pq.write_table(pa.table({"id": ["a"], "question": ["q"], "image": pa.nulls(1)}), path)
    assert read_source(path).schema.field("image").type == pa.string()
