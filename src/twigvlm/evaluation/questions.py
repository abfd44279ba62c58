"""Questions about pictures, with their right answers and the rules that score an answer."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twigvlm.errors import TwigVLMError
from twigvlm.images import is_remote, is_uri


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    id: str
    """Its id, which no other question of the file has."""
    image: Path | str
    """Path of the picture, or a data URI."""
    prompt: str
    """The text of the question."""
    answer: str
    """The right answer; for a description, one of many."""
    kind: str
    """Kind of question; results are broken down by it."""
    held_out: bool = False
    """Whether the answer depends on something that was held out of training; such questions are reported separately."""
    objects: tuple[str, ...] | None = None
    """For a description, the objects in the picture, by their names in the vocabulary. None: the answer is right or wrong."""
    texts: tuple[str, ...] = ()
    """For a description, the texts in the picture, which it should quote."""
    long: bool = False
    """Whether an answer that is scored as right or wrong may be as long as a description."""
    source: str = field(default="", compare=False)
    """The image as the file of questions names it; empty: the question is not from a file."""

    @property
    def group(self) -> str:
        """The kind, with held-out questions as a kind of their own."""
        return f"{self.kind}, held out" if self.held_out else self.kind

    @property
    def picture(self) -> str:
        """An id of the picture: the same for all questions about it, and independent of the location of the file of questions."""
        return hashlib.sha256((self.source or str(self.image)).encode()).hexdigest()[:12]

    @property
    def has_long_answer(self) -> bool:
        """Whether the question asks for a description, or for an answer that may be as long."""
        return self.long or self.objects is not None

    def limit(self, short: int, description: int) -> int:
        """Largest number of tokens of the answer: `description` for a long answer, otherwise `short`."""
        return description if self.has_long_answer else short


@dataclass(frozen=True)
class Questions:
    """A file of questions."""

    items: tuple[Question, ...]
    """The questions, in the order of the file."""
    split: str
    """Name of the split of the data, according to the file; empty if it does not say."""
    vocabulary: Mapping[str, tuple[str, ...]]
    """Name of an object -> the words that count as naming it."""

    def chosen(self, kinds: Sequence[str] = (), limit: int | None = None) -> "Questions":
        """The first `limit` questions of the given kinds (none given: of all).

        Raises:
            TwigVLMError: no question is of one of the kinds, or the limit is below 1.
        """
        there = sorted({question.kind for question in self.items})
        for kind in kinds:
            if kind not in there:
                raise TwigVLMError(f"kind {kind!r}: no question is of this kind; choose from {', '.join(there)}")
        if limit is not None and limit < 1:
            raise TwigVLMError(f"limit={limit}: must be 1 or more")
        items = [question for question in self.items if not kinds or question.kind in kinds]
        return Questions(tuple(items[:limit]), self.split, self.vocabulary)

    def refuse_test(self, purpose: str) -> None:
        """Raise TwigVLMError on the test split: settings that are chosen on a split cannot be evaluated on it."""
        if self.split == "test":
            raise TwigVLMError(f"questions of the test split: {purpose} needs the validation split; give its file")


def load_questions(path: Path) -> Questions:
    """Read `{"split": …, "vocabulary": {name: [forms]}, "questions": [{"id", "image", "question", "answer", "kind"}]}`.

    `split`, `vocabulary`, and a question's `held_out`, `objects`, `texts` and `long` may be missing. Image paths are relative to
    the file; an image may also be a data URI.

    Raises:
        TwigVLMError: names the file or the question, what is wrong with it, and the remedy.
    """
    name = f"questions {str(path)!r}"
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise TwigVLMError(f"{name}: no such file; give a JSON file of questions") from None
    except OSError as error:
        raise TwigVLMError(f"{name}: cannot be read ({error.strerror}); give a JSON file of questions") from None
    except ValueError as error:
        raise TwigVLMError(f"{name}: not readable as JSON ({error}); fix it or export it again") from None
    rows = record.get("questions") if isinstance(record, dict) else None
    if not isinstance(rows, list) or not rows:
        raise TwigVLMError(f"{name}: has no list under 'questions'; export it again")
    vocabulary = _vocabulary(record.get("vocabulary", {}), name)
    items = tuple(_question(row, number, path.parent, vocabulary, name) for number, row in enumerate(rows))
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise TwigVLMError(f"{name}: two questions have the id {item.id!r}; give each its own")
        seen.add(item.id)
    return Questions(items, str(record.get("split", "")), vocabulary)


def _vocabulary(value: Any, name: str) -> dict[str, tuple[str, ...]]:
    good = isinstance(value, dict) and all(
        isinstance(forms, list) and forms and all(isinstance(form, str) and form.strip() for form in forms)
        for forms in value.values()
    )
    if not good:
        raise TwigVLMError(f"{name}: 'vocabulary' must map each name to a list of the words that count as it")
    owners: dict[str, str] = {}
    for key, forms in value.items():
        for form in forms:
            other = owners.setdefault(form.lower(), key)
            if other != key:
                raise TwigVLMError(
                    f"{name}: in the vocabulary {form!r} counts as both {other!r} and {key!r}; leave it to one of them"
                )
    return {key: tuple(forms) for key, forms in value.items()}


def _question(row: Any, number: int, folder: Path, vocabulary: Mapping[str, Any], name: str) -> Question:
    if not isinstance(row, dict):
        raise TwigVLMError(f"{name}: question {number} is a JSON {type(row).__name__}; make it an object")
    where = f"{name}: question {row.get('id', number)!r}"
    for key in ("id", "image", "question", "answer", "kind"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise TwigVLMError(f"{where}: {key!r} is missing or not text; fill it in")
    if is_remote(row["image"]):
        raise TwigVLMError(f"{where}: remote image {row['image']!r}; download it and give its path")
    image = row["image"] if is_uri(row["image"]) else folder / row["image"]
    if not is_uri(image) and not os.path.isfile(image):
        raise TwigVLMError(f"{where}: no image file {str(image)!r}; image paths are relative to the file of questions")
    objects = row.get("objects")
    if objects is not None:
        if not isinstance(objects, list) or not all(isinstance(thing, str) for thing in objects):
            raise TwigVLMError(f"{where}: 'objects' must be a list of names")
        for thing in objects:
            if thing not in vocabulary:
                raise TwigVLMError(f"{where}: object {thing!r} is not in the vocabulary; add it there")
    flags = {key: row.get(key, False) for key in ("held_out", "long")}
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise TwigVLMError(f"{where}: {key!r} must be true or false")
    texts = row.get("texts", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise TwigVLMError(f"{where}: 'texts' must be a list of the texts in the picture")
    things = None if objects is None else tuple(dict.fromkeys(objects))
    about = row["id"], image, row["question"], row["answer"], row["kind"]
    source = str(image) if is_uri(image) else os.path.normpath(row["image"])
    return Question(*about, objects=things, texts=tuple(texts), **flags, source=source)


def exact_match(given: str, expected: str) -> bool:
    """Whether two answers are the same, apart from letter case, outer white space and one final period."""
    return _plain(given) == _plain(expected)


def quoted(text: str, given: str) -> bool:
    """Whether an answer contains a text as whole words, in the same letter case."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", given) is not None


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().lower()


class Namer:
    """Finds the objects that a text names.

    Args:
        vocabulary: name of an object -> the words that count as naming it.
    """

    def __init__(self, vocabulary: Mapping[str, Sequence[str]]) -> None:
        names = {form.lower(): name for name, forms in vocabulary.items() for form in forms}
        self._capitals = {form for forms in vocabulary.values() for form in forms if form.isupper()}
        # Longest first: in "polar bear" no "bear" is named.
        forms = sorted(names, key=lambda form: (-len(form), form))
        # Each form is a group: what ignores letter case, such as "İ" for "i", need not be the form in small letters.
        self._names = [names[form] for form in forms]
        groups = "|".join(f"({re.escape(form)})" for form in forms)
        self._pattern = re.compile(rf"(?<!\w)(?:{groups})(?!\w)", re.IGNORECASE) if forms else None

    def __call__(self, text: str) -> set[str]:
        """The names of the objects whose words occur in the text as whole words, in any letter case.

        Words in capitals are quotations of signs and do not count, unless the vocabulary has them in capitals, such as "TV".
        """
        if self._pattern is None:
            return set()
        found = ((match.group(), match.lastindex or 0) for match in self._pattern.finditer(text))
        return {self._names[at - 1] for form, at in found if not form.isupper() or form in self._capitals}
