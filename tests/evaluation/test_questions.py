import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.questions import Namer, Question, exact_match, load_questions
from twigvlm.evaluation.run import one_by_one

SHORT = {"id": "a", "image": "one.png", "question": "What?", "answer": "A dog", "kind": "place"}
LONG = {**SHORT, "id": "b", "kind": "description", "objects": ["dog", "cat", "dog"], "held_out": True}
VOCABULARY = {"dog": ["dog", "Dogs"], "cat": ["cat"]}


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")

    def to_file(*rows, **more):
        path = tmp_path / "questions.json"
        path.write_text(json.dumps({"vocabulary": VOCABULARY, "questions": list(rows), **more}))
        return path

    return to_file


def test_reads_questions(write, tmp_path):
    questions = load_questions(write(SHORT, LONG, split="test"))
    image = tmp_path / "one.png"
    assert questions.items == (
        Question("a", image, "What?", "A dog", "place"),
        Question("b", image, "What?", "A dog", "description", True, ("dog", "cat")),
    )
    assert questions.split == "test"
    assert questions.vocabulary == {"dog": ("dog", "Dogs"), "cat": ("cat",)}
    assert [item.group for item in questions.items] == ["place", "description, held out"]


def test_chooses_kinds_and_a_number(write):
    questions = load_questions(write(SHORT, LONG))
    assert [item.id for item in questions.chosen(["description"]).items] == ["b"]
    assert [item.id for item in questions.chosen(limit=1).items] == ["a"]
    assert len(questions.chosen().items) == 2
    with pytest.raises(TwigVLMError, match=r"'colour'.*description, place"):
        questions.chosen(["colour"])
    with pytest.raises(TwigVLMError, match="limit=0"):
        questions.chosen(limit=0)


def test_records_say_which_questions_are_about_one_picture(write, monkeypatch):
    uri = "data:image/png;base64,AAAA"
    images = ("one.png", uri, "./one.png", uri)
    file = write(*({**SHORT, "id": name, "image": image} for name, image in zip("abcd", images, strict=True)))

    def pictures(path):
        return [item.about["picture"] for item in one_by_one(load_questions(path).items)]

    found = pictures(file)
    assert found[0] != found[1]
    assert found[2:] == found[:2]
    monkeypatch.chdir(file.parent)
    assert pictures(Path(file.name)) == found, "however the file is named"
    copied = shutil.copytree(file.parent, file.parent.parent / "elsewhere")
    assert pictures(copied / file.name) == found, "wherever the file lies"


def test_settings_are_not_chosen_on_the_test_split(write):
    load_questions(write(SHORT, split="validation")).refuse_test("tuning")
    with pytest.raises(TwigVLMError, match="tuning needs the validation split"):
        load_questions(write(SHORT, split="test")).refuse_test("tuning")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**SHORT, "answer": ""}, "'a'.*'answer'"),
        ({"id": "a"}, "'image'"),
        ({**SHORT, "image": "none.png"}, "none.png"),
        ({**SHORT, "id": 3}, "'id'"),
        ({**SHORT, "held_out": "no"}, "'held_out'"),
        ({**LONG, "objects": ["cow"]}, "'cow' is not in the vocabulary"),
        ({**LONG, "objects": "dog"}, "'objects' must be a list"),
        ({**LONG, "objects": [["dog"]]}, "'objects' must be a list of names"),
        ([], "question 0 is a JSON list"),
    ],
)
def test_names_what_is_wrong_with_a_question(write, row, words):
    with pytest.raises(TwigVLMError, match=words) as raised:
        load_questions(write(row))
    assert "\n" not in str(raised.value)


def test_names_what_is_wrong_with_a_file(write, tmp_path):
    with pytest.raises(TwigVLMError, match="two questions have the id 'a'"):
        load_questions(write(SHORT, SHORT))
    with pytest.raises(TwigVLMError, match="no list under 'questions'"):
        load_questions(write())
    with pytest.raises(TwigVLMError, match="'vocabulary'"):
        load_questions(write(SHORT, vocabulary={"dog": "dogs"}))
    ambiguous = {"mouse": ["mouse", "mice"], "computer mouse": ["Mouse"]}
    with pytest.raises(TwigVLMError, match="'Mouse' counts as both 'mouse' and 'computer mouse'; leave it to one"):
        load_questions(write(SHORT, vocabulary=ambiguous))
    with pytest.raises(TwigVLMError, match="no such file"):
        load_questions(tmp_path / "other.json")
    with pytest.raises(TwigVLMError, match="cannot be read \\(Is a directory\\); give a JSON file of questions"):
        load_questions(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(TwigVLMError, match="not readable as JSON"):
        load_questions(tmp_path / "broken.json")


@pytest.mark.parametrize("given", ["a dog", " A Dog. ", "a dog.\n", "A DOG ."])
def test_exact_match_forgives_case_space_and_period(given):
    assert exact_match(given, "A dog")


@pytest.mark.parametrize("given", ["dog", "a dog..", "a  dog", "a dog!", ""])
def test_exact_match_forgives_nothing_else(given):
    assert not exact_match(given, "A dog")


def test_objects_named_in_a_text():
    named = Namer({**VOCABULARY, "bear": ["bear"], "polar bear": ["polar bear"], "c++": ["c++"]})
    assert named("Dogs and a Polar bear. A sign says CAT.") == {"dog", "polar bear"}
    assert named("a bear, a cat's tail, a hotdog, cats") == {"bear", "cat"}
    assert named("") == set()
    assert Namer({})("a dog") == set()
    assert Namer({"cow": ["inek"]})("İnek çayırda") == {"cow"}


def test_words_in_capitals_count_where_the_vocabulary_has_them_so(write):
    row = {**SHORT, "kind": "description", "objects": ["tv"]}
    named = Namer(load_questions(write(row, vocabulary={"tv": ["TV", "television"]})).vocabulary)
    assert named("There is a TV.") == named("a tv") == named("A television") == {"tv"}
    assert named("A sign says TELEVISION.") == set()
