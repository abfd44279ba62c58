"""The source of questions, and the folder of answers: several workers write it, and a continued run reads it again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from twigvlm.errors import TwigVLMError, one_line
from twigvlm.files import replacing
from twigvlm.images import is_uri
from twigvlm.serving.batch import BatchLine, json_lines
from twigvlm.serving.checks import asked_pruning, check_limits
from twigvlm.serving.limits import Limits
from twigvlm.serving.notes import check_note

QUESTIONS = "questions.jsonl"
"""File in a folder of pictures: one JSON object a line, with `question`, `image` (a path in the folder) and perhaps `id`."""
SETTINGS = "settings.json"
"""File in a folder of answers: the settings that the answers depend on."""
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("answer", pa.string()),
        ("error", pa.string()),
        ("tokens", pa.int64()),
        ("visual_tokens", pa.float64()),
        ("asked", pa.string()),
    ]
)
_RECORDS = 2  # version of the schema
_ASKED = "asked"
"""Column with a digest of the question and picture that a record had when it was answered; see `asked`."""


def request_body(model: str, parts: list[dict[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat completion request about one record.

    Args:
        model: name of the model.
        parts: parts of the user's message.
        options: further fields of the request.
    """
    return {"model": model, "messages": [{"role": "user", "content": parts}], **options}


def check_options(options: Mapping[str, Any], limits: Limits) -> None:
    """Raise TwigVLMError if an option would make every record fail, as far as this can be checked without a model."""
    if taken := sorted({"model", "messages"} & options.keys()):
        raise TwigVLMError(f"options: {', '.join(taken)} come from the model and the records; leave them out")
    body = request_body("any", [{"type": "text", "text": "any"}], options)
    try:
        json.dumps(body)
    except (TypeError, ValueError) as error:
        raise TwigVLMError(f"options: cannot be written as JSON ({one_line(error)}); give numbers and texts") from None
    request = BatchLine("any", body).request()
    check_limits(request, limits)
    asked_pruning(request)


def read_source(source: Path) -> pa.Table:
    """Read the records of a Parquet file or folder, or of a folder of pictures with `questions.jsonl`.

    Returns:
        A table with the columns `id`, `question` and `image`; a record without an `id` gets its number.

    Raises:
        TwigVLMError: the source cannot be read, lacks a column, or has an `id` twice.
    """
    name = f"source {str(source)!r}"
    listed = source / QUESTIONS
    if listed.exists():
        lines = []
        for number, line in json_lines(listed, f"source {str(listed)!r}"):
            if not isinstance(line, dict) or not isinstance(line.get("question"), str):
                raise TwigVLMError(f"source {str(listed)!r}: line {number}: needs an object with a text `question`")
            if not isinstance(line.get("image"), str | None):
                raise TwigVLMError(
                    f"source {str(listed)!r}: line {number}: needs a path as `image`, or null for no image"
                )
            lines.append(line)
        table = pa.table({
            "id": pa.array([None if line.get("id") is None else str(line["id"]) for line in lines], pa.string()),
            "question": [line["question"] for line in lines],
            "image": pa.array([_in_folder(source, line.get("image")) for line in lines], pa.string()),
        })  # fmt: skip
    else:
        try:
            data = pq.ParquetDataset(source)
            table = data.read([name for name in ("id", "question", "image") if name in data.schema.names])
        except (OSError, pa.ArrowException) as error:
            raise TwigVLMError(
                f"{name}: is no Parquet file, and no folder with {QUESTIONS} ({one_line(error)}); give one of them"
            ) from None
    if missing := {"id", "question", "image"} - set(table.column_names):
        raise TwigVLMError(f"{name}: has no column {', '.join(sorted(missing))}; add it")
    if pa.types.is_null(table.schema.field("image").type):  # Ray would make numbers of a column without any value
        at = table.schema.get_field_index("image")
        table = table.set_column(at, "image", table.column("image").cast(pa.string()))
    # What has no id is called by its number.
    ids = [str(number if key is None else key) for number, key in enumerate(table.column("id").to_pylist())]
    if len(set(ids)) < len(ids):
        raise TwigVLMError(f"{name}: has two records with the same id; give each its own")
    return table.select(["question", "image"]).add_column(0, "id", pa.array(ids, pa.string()))


def _in_folder(source: Path, image: str | None) -> str | None:
    """The absolute path of an image in a folder; data URIs stay as they are."""
    return image if image is None or is_uri(image) else str((source / image).absolute())


def asked(question: Any, image: Any) -> str:
    """A digest of a record's question and picture; of a picture given by path, the path counts and not the file."""
    picture = image if isinstance(image, bytes) else str(image).encode()
    return hashlib.sha256(json.dumps(str(question)).encode() + picture).hexdigest()


def open_answers(out: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Create a folder of answers, or open an existing one to continue it.

    Args:
        out: the folder.
        settings: settings that the answers depend on, JSON-able.

    Returns:
        The digest of `asked` by the id of each record that was answered without an error.

    Raises:
        TwigVLMError: the folder holds answers with other settings. Settings without answers are replaced.
    """
    out.mkdir(parents=True, exist_ok=True)
    begun = any(out.glob("part-*.parquet"))
    check_note(out / SETTINGS, {**settings, "records": _RECORDS}, begun, f"out {str(out)!r}", "directory")
    answers = _parts(out, ["id", "error", _ASKED]).to_pylist()
    return {row["id"]: row[_ASKED] for row in answers if row["error"] is None}


def unanswered(records: pa.Table, answered: Mapping[str, str]) -> pa.Table:
    """The records that have no answer yet.

    Args:
        records: from `read_source`.
        answered: from `open_answers`.

    Raises:
        TwigVLMError: a record has changed since it was answered.
    """
    ids = records.column("id").to_pylist()
    for row, key in enumerate(ids):
        if key in answered:
            question, image = (records.column(name)[row].as_py() for name in ("question", "image"))
            if answered[key] != asked(question, image):
                raise TwigVLMError(f"source: the record {key!r} has changed since it was answered; name another out")
    return records.filter(pa.array([key not in answered for key in ids], pa.bool_()))


def write_answers(out: Path, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write the answers of a batch to a file of its own, which is complete or absent.

    Args:
        out: folder of the answers.
        answers: id -> the other columns.

    Returns:
        The columns that `read_answers` gives.
    """
    columns = {"id": [*answers], **{name: [row[name] for row in answers.values()] for name in _SCHEMA.names[1:]}}
    with replacing(_part(out, answers)) as temporary:
        pq.write_table(pa.table(columns, schema=_SCHEMA), temporary)
    return {name: column for name, column in columns.items() if name != _ASKED}


def written_answers(out: Path, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """What `write_answers` returned for this very batch to a worker that was lost later; None: it did not, or a record failed.

    Args:
        out: folder of the answers.
        digests: id -> what was `asked`.
    """
    if not (part := _part(out, digests)).exists():
        return None
    columns = pq.read_table(part).to_pydict()
    known = dict(zip(columns["id"], columns.pop(_ASKED), strict=True)) == digests
    return columns if known and not any(columns["error"]) else None


def _part(out: Path, ids: Iterable[str]) -> Path:
    """The file of a batch."""
    return out / f"part-{hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:32]}.parquet"


def read_answers(out: str | Path) -> pa.Table:
    """Read all answers of a folder: one row for each `id`, sorted by `id`; a failure only counts if there is no answer.

    A worker that is lost after it wrote may have written under another grouping of records; the answers are the same.
    """
    table = _parts(Path(out), [name for name in _SCHEMA.names if name != _ASKED])
    best: dict[str, int] = {}
    errors = table.column("error").to_pylist()
    for row, key in enumerate(table.column("id").to_pylist()):
        if errors[best.setdefault(key, row)] is not None:
            best[key] = row
    return table.take(pa.array([best[key] for key in sorted(best)], pa.int64()))


def _parts(out: Path, columns: list[str]) -> pa.Table:
    """All rows that workers wrote, repeated ids included."""
    tables = [pq.read_table(path, columns=columns) for path in sorted(out.glob("part-*.parquet"))]
    return pa.concat_tables(tables or [_SCHEMA.empty_table().select(columns)])
