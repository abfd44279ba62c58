"""Ray: batch inference on Ray Data, and a Ray Serve application.

    answer_dataset("questions.parquet", "answers", open_model("sapling"), workers=2)
    serve.run(serve_app(open_model("sapling")))

A worker holds a model and answers several records at once. Answers are written by the workers, each batch to a file of its
own that is there whole or not at all, so that a worker which is lost, or a run that is started again, loses and repeats none.
"""

import base64
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import ray
from ray import serve

from twigvlm.errors import TwigVLMError
from twigvlm.images import load_image
from twigvlm.integrations.answers import (
    asked,
    check_options,
    open_answers,
    read_source,
    request_body,
    unanswered,
    write_answers,
)
from twigvlm.integrations.answers import read_answers as read_answers
from twigvlm.serving.aside import load_aside
from twigvlm.serving.batch import BatchLine, BatchRun, patient
from twigvlm.serving.limits import Limits
from twigvlm.serving.service import Defaults, Service

MakeService = Callable[[Limits], Service]
"""Loads a model, in a worker."""

RETRIES = 3
"""How often a batch is tried again whose worker was lost. Without an end, a record that kills its worker would never let go."""
REFUSED = 16
"""Requests that a replica gets beyond its places, so that it refuses them with status 429; Ray would let them wait."""


@dataclass(frozen=True)
class OpenModel:
    """Makes a service in a worker; arguments as in `open_model`."""

    model: str
    twig: str | None
    dtype: str
    device: str
    defaults: Defaults | None

    def __call__(self, limits: Limits) -> Service:
        """Load the model."""
        from twigvlm.loading import bare, default_twig, load

        twig = self.twig or default_twig(self.model)
        base, processor, loaded = load_aside(lambda: load(self.model, twig, self.dtype, self.device))
        exits = self.defaults is not None and self.defaults.speculate == "exit"
        model = bare(base, exits) if loaded is None else loaded
        return Service(model, processor, self.model, self.defaults, limits, has_twig=loaded is not None)

    def settings(self) -> dict[str, Any]:
        """What answers depend on, JSON-able."""
        from twigvlm.loading import default_twig
        from twigvlm.pruning.methods import own_files
        from twigvlm.serving.notes import noted_twig

        twig, defaults = noted_twig(self.twig or default_twig(self.model)), self.defaults or Defaults()
        files = own_files([defaults.pruning.pruner])
        return {"model": self.model, "twig": twig, "dtype": self.dtype, **asdict(defaults), **files}


def open_model(
    model: str,
    twig: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    defaults: Defaults | None = None,
) -> OpenModel:
    """What makes a service in a worker.

    Args:
        model: base: "sapling", a Hugging Face id or a directory that all workers reach.
        twig: directory or hub id; None: Sapling's own, and of another model none.
        dtype: as in `twigvlm.loading.load`.
        device: device of each worker.
        defaults: pruning and speculation; None: neither.
    """
    return OpenModel(model, twig, dtype, device, defaults)


class Answerer:
    """Answers batches of records; for `map_batches`.

    Records have `id`, `question` and `image`: a file's bytes, a path that the worker reaches, a data URI, or null. Answers go to
    files in a folder, and come back as `id`, `answer`, `error` (null if there is none), `tokens` and `visual_tokens`, the R̄ of
    the answer.

    Args:
        make_service: from `open_model`.
        out: folder of the answers.
        options: further fields of each request, for example `retain` and `max_completion_tokens`.
        limits: limits of each request, without those of its time.
    """

    def __init__(self, make_service: MakeService, out: str, options: dict[str, Any], limits: Limits) -> None:
        self._service, self._out, self._options = make_service(patient(limits)), Path(out), options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The answers to one batch."""
        found: dict[str, dict[str, Any]] = {}
        digests: dict[str, str] = {}
        lines = []
        for key, question, image in zip(batch["id"], batch["question"], batch["image"], strict=True):
            digests[str(key)] = asked(question, image)
            try:
                if not isinstance(question, str):
                    raise TwigVLMError("question: must be a text")
                lines.append(BatchLine(str(key), self._body(question, image)))
            except TwigVLMError as error:
                found[str(key)] = _record(None, str(error), {})

        def on_result(key: str, status: int, body: dict[str, Any]) -> None:
            if status == 200:
                found[key] = _record(body["choices"][0]["message"]["content"], None, body["usage"])
            else:
                found[key] = _record(None, body["error"]["message"], {})

        BatchRun(self._service, on_result).run(lines)
        return write_answers(self._out, {key: {**found[key], "asked": digests[key]} for key in digests})

    def _body(self, question: str, image: Any) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": _data_uri(image)}})
        return request_body(self._service.name, parts, self._options)


def answer_dataset(
    source: str | Path,
    out: str | Path,
    make_service: MakeService,
    *,
    workers: int = 1,
    batch_size: int = 16,
    cpus: float = 1,
    gpus: float = 0,
    limits: Limits | None = None,
    **options: Any,
) -> int:
    """Answer the records of a Parquet file or folder, or of a folder of pictures with `questions.jsonl`; how many were left.

    Records whose answers are in `out` are not answered again: a run that was interrupted goes on when it is started again, with
    the same options. Records that failed are tried again. A batch whose worker is lost `RETRIES` times and once more ends the run
    with Ray's error; what is answered by then stays.

    Args:
        source: what to answer; see `Answerer` for the columns.
        out: folder of the answers, in Parquet.
        make_service: from `open_model`.
        workers: models that answer at the same time.
        batch_size: records that are written together, and so are lost together with a worker.
        cpus: number of CPUs of each worker.
        gpus: number of GPUs of each worker.
        limits: limits of each request; those of its time do not apply. None: those of `twigvlm serve`.
        options: further fields of each request.

    Raises:
        TwigVLMError: an option is none or beyond the limits, the source has not these columns or an `id` twice, or `out` holds
            answers with other options, or of a record that has changed since.
    """
    limits = limits or Limits()
    check_options(options, limits)
    out = Path(out).absolute()
    records = read_source(Path(source))
    model = make_service.settings() if isinstance(make_service, OpenModel) else {}
    answered = open_answers(out, {**options, "model": model, "limits.max_tokens": limits.max_tokens})
    left = unanswered(records, answered)
    if not len(left):
        return 0
    # Small blocks, so that all workers have something to do.
    blocks = max(1, min(len(left) // batch_size, 4 * workers))
    data = ray.data.from_arrow(left).repartition(blocks)
    batches = data.map_batches(
        Answerer,
        fn_constructor_args=(make_service, str(out), options, limits),
        batch_size=batch_size,
        batch_format="numpy",
        num_cpus=cpus,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(size=workers),
        ray_remote_args_fn=lambda: {"max_task_retries": RETRIES},
    )
    for _ in batches.iter_batches(batch_size=None):
        pass
    return len(left)


def serve_app(
    make_service: MakeService, api_key: str | None = None, limits: Limits | None = None, **deployment: Any
) -> Any:
    """A Ray Serve application: the same HTTP interface, streams included, with a model in each replica.

    Args:
        make_service: from `open_model`.
        api_key: that clients must send; None: none.
        limits: limits of each replica; None: those of `twigvlm serve`.
        deployment: of `serve.deployment`, for example `num_replicas=2`, `autoscaling_config={...}`, `ray_actor_options={...}`.
    """
    limits = limits or Limits()

    def build() -> Any:
        from twigvlm.serving.app import create_app

        return create_app(make_service(limits), api_key)

    max_requests = limits.max_rows + limits.max_waiting + REFUSED
    options = {"max_ongoing_requests": max_requests, "max_queued_requests": max_requests, **deployment}
    return serve.deployment(serve.ingress(build)(), **options).bind()


def _record(answer: str | None, error: str | None, usage: dict[str, Any]) -> dict[str, Any]:
    visual = usage.get("prompt_tokens_details", {}).get("average_visual_tokens", 0.0)
    return {"answer": answer, "error": error, "tokens": usage.get("completion_tokens", 0), "visual_tokens": visual}


def _data_uri(image: Any) -> str:
    """A picture as requests hold it."""
    data = BytesIO()
    load_image(image).save(data, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
