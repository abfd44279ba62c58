"""The first thousand questions of TGIF-QA, MSVD-QA and MSRVTT-QA: the functions that the tasks' YAML files refer to.

The folder in the environment variable `TWIGVLM_VIDEOS` holds the data as Video-LLaVA's evaluation lays it out, for example
`TGIF_Zero_Shot_QA/test_q_1k.json`, `TGIF_Zero_Shot_QA/test_a_1k.json` and `TGIF_Zero_Shot_QA/mp4/NAME.mp4`.
"""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from twigvlm.errors import TwigVLMError

FOLDER = "TWIGVLM_VIDEOS"
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")


def load(places: Any) -> Any:
    """Load questions with their answers and videos, from a data set of one record that says where they are.

    Args:
        places: the data set, with `questions`, `answers` and `videos`: paths relative to the folder `TWIGVLM_VIDEOS`.

    Returns:
        A data set with `question`, `question_id`, `answer` and `video`, the path of a file.

    Raises:
        TwigVLMError: the folder is not named, a file is missing or broken, or questions and answers do not match.
    """
    from datasets import Dataset

    if FOLDER not in os.environ:
        raise TwigVLMError(f"{FOLDER}: is not set; see docs/lmms-eval.md for what belongs into this folder")
    folder, place = Path(os.environ[FOLDER]), places[0]
    questions, answers = (_read(folder / place[kind]) for kind in ("questions", "answers"))
    if [one["question_id"] for one in questions] != [one["question_id"] for one in answers]:
        raise TwigVLMError(
            f"{folder / place['answers']}: answers other questions than {place['questions']} asks; put the two that "
            "belong together there"
        )
    videos = {path.stem: path for path in (folder / place["videos"]).glob("*") if path.suffix.lower() in SUFFIXES}
    if missing := sorted({one["video_name"] for one in questions} - videos.keys()):
        raise TwigVLMError(
            f"{folder / place['videos']}: lacks {len(missing)} of the videos that are asked about, the first is {missing[0]}; "
            "put them there"
        )
    return Dataset.from_list(
        [
            {
                "question_id": asked["question_id"],
                "question": asked["question"],
                "answer": str(answer["answer"]),
                "video": str(videos[asked["video_name"]]),
            }
            for asked, answer in zip(questions, answers, strict=True)
        ]
    )


def video(doc: dict[str, Any]) -> list[str]:
    """The path of a question's video, as a list of one."""
    return [doc["video"]]


def contained(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score without a judge: 1 if the given answer contains the words of the right one, one after another."""
    given, right = (" ".join(re.findall(r"\w+", text.lower())) for text in (results[0], doc["answer"]))
    return {"contained": float(f" {right} " in f" {given} ")}


def judged(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score by lmms-eval's judge: 1 if it accepts the answer. `API_TYPE` and `MODEL_VERSION` choose the judge.

    Raises:
        TwigVLMError: the judge gave no verdict.
    """
    verdict = _judge().evaluate_binary(doc["question"], doc["answer"], results[0], output_format="yes/no")
    if not verdict["raw_response"]:
        raise TwigVLMError(
            f"question {doc['question_id']}: the judge gave no verdict; check MODEL_VERSION, API_TYPE and the key"
        )
    return {"judged": float(verdict["result"])}


@cache
def _judge() -> Any:
    from lmms_eval.llm_judge import ServerConfig, get_server

    model = os.getenv("MODEL_VERSION", "gpt-3.5-turbo")
    return get_server(os.getenv("API_TYPE", "openai"), ServerConfig(model_name=model, temperature=0.0, max_tokens=16))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        raise TwigVLMError(
            f"{path}: cannot be read ({error}); put the file of Video-LLaVA's evaluation there"
        ) from None
