"""Ray: batch inference on Ray Data, and a Ray Serve application.

    answer_dataset("questions.parquet", "answers", OpenModel("sapling"), workers=2)
    serve.run(serve_app(OpenModel("sapling")))

Each worker loads a model and answers several records at once. It writes the answers of each batch to a file of its own, which
is complete or absent, so that a lost worker or a restarted run neither loses nor repeats answers.
"""

import base64
from collections.abc import Callable, Collection
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
    written_answers,
)
from twigvlm.integrations.answers import read_answers as read_answers
from twigvlm.serving.aside import load_aside
from twigvlm.serving.batch import BatchLine, BatchRun, patient
from twigvlm.serving.limits import Limits
from twigvlm.serving.service import Defaults, Service

MakeService = Callable[[Limits], Service]
"""(limits) -> a service; called in each worker, where it loads the model."""

RETRIES = 3
"""How often a batch is tried again after its worker was lost. Without a limit, a record that kills its worker would be tried
for ever."""
REFUSED = 16
"""Requests that a replica accepts beyond its limits, so that it can refuse them with status 429; Ray would let them wait."""


@dataclass(frozen=True)
class OpenModel:
    """Loads a model in a worker, as a service that answers requests.

    Args:
        model: the base: "sapling", a Hugging Face id, or a directory that all workers reach.
        twig: directory or hub id of the twig; None: Sapling's own, and no twig for any other model.
        dtype: data type, as in `twigvlm.loading.load`.
        device: device of each worker.
        defaults: pruning and speculation of requests that ask for none; None: neither.
    """

    model: str
    twig: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    defaults: Defaults | None = None

    def __call__(self, limits: Limits) -> Service:
        """Load the model, and make a service that keeps these limits."""
        from twigvlm.loading import default_twig, load, without_twig

        twig = self.twig or default_twig(self.model)
        base, processor, loaded = load_aside(lambda: load(self.model, twig, self.dtype, self.device))
        exits = self.defaults is not None and self.defaults.speculate == "exit"
        model = without_twig(base, exits) if loaded is None else loaded
        return Service(model, processor, self.model, self.defaults, limits)

    def settings(self) -> dict[str, Any]:
        """The settings that answers depend on, JSON-able."""
        from twigvlm.loading import default_twig
        from twigvlm.pruning.methods import method_files
        from twigvlm.serving.notes import noted_twig

        twig, defaults = noted_twig(self.twig or default_twig(self.model)), self.defaults or Defaults()
        files = method_files([defaults.pruning.pruner])
        return {"model": self.model, "twig": twig, "dtype": self.dtype, **asdict(defaults), **files}


class Answerer:
    """Answers batches of records, as a class for Ray's `map_batches`.

    A record has `id`, `question` and `image`: a file's bytes, a path that the worker can read, a data URI, or null. Answers are
    written to files in a folder, and returned as `id`, `answer`, `error` (null if there is none), `tokens` and `visual_tokens`
    (R̄, visual tokens averaged over all layers).

    Args:
        make_service: an `OpenModel`, or any function that makes a service from limits.
        out: folder of the answers.
        options: further fields of each request, for example `retain` and `max_completion_tokens`.
        limits: limits of each request; those of time do not apply.
    """

    def __init__(self, make_service: MakeService, out: str, options: dict[str, Any], limits: Limits) -> None:
        self._service, self._out, self._options = make_service(patient(limits)), Path(out), options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer one batch, given and returned as columns."""
        records = [
            (str(key), *record) for key, *record in zip(batch["id"], batch["question"], batch["image"], strict=True)
        ]
        digests = {key: asked(question, image) for key, question, image in records}
        written = written_answers(self._out, digests)
        if written is not None:  # Ray repeats a whole block, of several batches
            return written
        found: dict[str, dict[str, Any]] = {}
        lines = []
        for key, question, image in records:
            try:
                if not isinstance(question, str):
                    raise TwigVLMError("question: must be a text")
                lines.append(BatchLine(key, self._body(question, image)))
            except TwigVLMError as error:
                found[key] = _record(None, str(error), {})

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
    """Answer the records of a Parquet file or folder, or of a folder of pictures with `questions.jsonl`.

    Records whose answers are in `out` are not answered again, so an interrupted run continues when it is started again with the
    same options. Records that failed are tried again. If a batch loses its worker more than `RETRIES` times, the run ends with
    Ray's error; the answers that have been written stay.

    Args:
        source: the records to answer; see `Answerer` for the columns.
        out: folder for the answers, in Parquet.
        make_service: an `OpenModel`, or any function that makes a service from limits.
        workers: models that answer at the same time.
        batch_size: number of records that are written together, and answered again together if their worker is lost.
        cpus: number of CPUs of each worker.
        gpus: number of GPUs of each worker.
        limits: limits of each request; those of time do not apply. None: those of `twigvlm serve`.
        options: further fields of each request.

    Returns:
        The number of records that were answered in this run, those that failed included.

    Raises:
        TwigVLMError: an option is unknown or beyond the limits, the source lacks a column or has an `id` twice, or `out` holds
            answers with other options or to a record that has changed.
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
    make_service: MakeService,
    api_key: str | None = None,
    limits: Limits | None = None,
    hosts: Collection[str] | None = None,
    **deployment: Any,
) -> Any:
    """A Ray Serve application with the HTTP interface of `twigvlm serve`, streams included, and a model in each replica.

    Args:
        make_service: an `OpenModel`, or any function that makes a service from limits.
        api_key: key that clients must send; None: no key is needed.
        limits: limits of each replica; None: those of `twigvlm serve`.
        hosts: names that a request's Host header may have, against DNS rebinding; none: any. None: with a key any, otherwise
            those of this machine.
        deployment: options of `serve.deployment`, for example `num_replicas=2`, `autoscaling_config={...}` or
            `ray_actor_options={...}`.
    """
    limits = limits or Limits()

    def build() -> Any:
        from twigvlm.serving.app import create_app
        from twigvlm.serving.hosts import allowed_hosts

        by_default = () if api_key else allowed_hosts("localhost", ())
        return create_app(make_service(limits), api_key, by_default if hosts is None else hosts)

    max_requests = limits.max_rows + limits.max_waiting + REFUSED
    options = {"max_ongoing_requests": max_requests, "max_queued_requests": max_requests, **deployment}
    return serve.deployment(serve.ingress(build)(), **options).bind()


def _record(answer: str | None, error: str | None, usage: dict[str, Any]) -> dict[str, Any]:
    visual = usage.get("prompt_tokens_details", {}).get("average_visual_tokens", 0.0)
    return {"answer": answer, "error": error, "tokens": usage.get("completion_tokens", 0), "visual_tokens": visual}


def _data_uri(image: Any) -> str:
    """A picture as a data URI, the form in which requests hold it."""
    data = BytesIO()
    load_image(image).save(data, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
