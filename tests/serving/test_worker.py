"""The worker's thread: jobs join, are given up and fail, and it lives on."""

import queue
import time
from types import SimpleNamespace

import pytest
import torch

from tests.serving.servers import chat, expected, picture, slow_down, tiny_model, tiny_service, wait_until
from twigvlm.serving.errors import RequestError
from twigvlm.serving.jobs import Failed
from twigvlm.serving.limits import Limits
from twigvlm.serving.protocol import ChatRequest


@pytest.fixture
def fresh():
    """Makes services that end with the test."""
    made = []

    def make(model=None, **limits):
        made.append(tiny_service(model, limits=Limits(**limits)))
        return made[-1]

    yield make
    for service in made:
        service.stop()


def submit(service, question="hello", **options):
    events = queue.Queue()
    job = service.prepare(ChatRequest.model_validate(chat(question, [picture()], **options)), events.put)
    service.worker.submit(job)
    return job, events


def outcome(events):
    """The ids of the first answer, or the error."""
    ids = []
    while True:
        event = events.get(timeout=20)
        if isinstance(event, Failed):
            return event.error
        ids += [token for token, _ in event.tokens]
        if event.finished:
            return ids


def value(service, name):
    (line,) = (line for line in service.metrics.text().splitlines() if line.startswith(f"{name} "))
    return float(line.split()[-1])


def break_engines(model, method, times, error):
    """Let a method of the runners of all engines that are made from now on raise, after some calls."""
    make, calls = model.engine, iter(times)

    def engine(**options):
        made = make(**options)
        work = getattr(made.runner, method)

        def broken(*arguments):
            if next(calls, False):
                raise error
            return work(*arguments)

        setattr(made.runner, method, broken)
        return made

    model.engine = engine


def test_a_cancelled_job_leaves_and_tells_nothing_more(fresh):
    service = fresh()
    slow_down(service, 0.02)
    job, events = submit(service, max_completion_tokens=80)
    events.get(timeout=10)
    assert value(service, "twigvlm_rows") == 1
    service.worker.cancel(job)
    wait_until(lambda: value(service, "twigvlm_rows") == 0)
    told = events.qsize()
    assert told < 40
    assert outcome(submit(service)[1]) == expected(service, "hello", [picture()], max_new_tokens=12)
    assert events.qsize() == told
    service.worker.cancel(job)  # once more is no error
    assert service.worker.alive


def test_a_prompt_is_counted_once_however_many_answers_it_has_and_however_they_end(fresh):
    service = fresh()
    job, events = submit(service, n=3, keep=5, max_completion_tokens=80)
    events.get(timeout=10)
    service.worker.cancel(job)  # as a stop text does
    assert len(outcome(submit(service, keep=5, max_completion_tokens=2)[1])) == 2
    totals = {name: value(service, f"twigvlm_{name}_tokens_total") for name in ("prompt", "visual", "kept_visual")}
    assert totals == {"prompt": 2 * job.prompt_tokens, "visual": 2 * 16, "kept_visual": 2 * 5}


def test_a_prompt_that_cannot_be_taken_up_fails_alone(fresh):
    model = tiny_model()
    service = fresh(model)
    slow_down(service, 0.01)
    break_engines(model, "prefill", [False, True], torch.OutOfMemoryError("no memory"))
    _, first = submit(service, max_completion_tokens=40)
    first.get(timeout=10)
    error = outcome(submit(service, "another")[1])
    assert (error.status, error.code) == (503, "out_of_memory")
    wait_until(lambda: value(service, "twigvlm_rows") == 0)
    assert outcome(submit(service)[1]) == expected(service, "hello", [picture()], max_new_tokens=12)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_after_a_failed_step_the_others_get_the_same_answers(fresh, sampling):
    model = tiny_model()
    service = fresh(model)
    options = {"max_completion_tokens": 12, **sampling}
    alone = [outcome(submit(service, f"question {n}", **options)[1]) for n in range(3)]
    service = fresh(model)
    slow_down(service, 0.02)
    break_engines(model, "verify", [False] * 3 + [True], RuntimeError("a broken kernel"))
    jobs = [submit(service, f"question {n}", **options) for n in range(3)]
    assert [outcome(events) for _, events in jobs] == alone
    assert value(service, "twigvlm_engine_failures_total") == 1


def test_the_job_at_fault_fails_alone(fresh):
    model = tiny_model()
    service = fresh(model)
    slow_down(service, 0.01)
    poison = "poison"
    make = model.engine

    def engine(**options):
        made = make(**options)
        verify = made.runner.verify

        def broken(draft):
            if any(row.max_new_tokens == 33 for row in made.runner.rows):
                raise RuntimeError(poison)
            return verify(draft)

        made.runner.verify = broken
        return made

    model.engine = engine
    good = [submit(service, f"question {n}", max_completion_tokens=15)[1] for n in range(2)]
    bad = submit(service, max_completion_tokens=33)[1]
    error = outcome(bad)
    assert error.status == 500
    assert poison not in str(error)
    for number, events in enumerate(good):
        assert outcome(events) == expected(service, f"question {number}", [picture()], max_new_tokens=15)
    assert service.worker.alive


def test_a_grammar_that_fails_ends_its_own_request_alone(fresh, monkeypatch):
    service = fresh()
    slow_down(service, 0.01)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    good = submit(service, "question", max_completion_tokens=30)[1]
    bad, events = submit(service, max_completion_tokens=30, response_format=form)
    wait_until(lambda: bad.started)
    bad.choices[0].grammar.error = RequestError("too much work")
    assert str(outcome(events)) == "too much work"
    assert outcome(good) == expected(service, "question", [picture()], max_new_tokens=30)
    assert value(service, "twigvlm_engine_failures_total") == 0


def test_a_message_of_the_grammar_library_is_one_line_of_bounded_length(fresh, monkeypatch, caplog):
    service = fresh()
    with pytest.raises(RequestError, match=r"refuses it \(regex parse error: \( \^ error: unclosed group\)"):
        service.grammars.compile({"type": "string", "pattern": "("})
    processor = service.grammars.compile({"type": "object"}).processor(0)
    long = "too much work\n" + "schema " * 10_000

    processor._matcher = SimpleNamespace(
        consume_token=print, unsafe_compute_mask_ptr=print, is_error=lambda: True, get_error=lambda: long
    )
    processor(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, service.model.base.vocabulary))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("a grammar failed: too much work schema schema")
    assert len(message) < 400


def test_what_fails_unforeseen_fails_what_is_under_way_and_no_more(fresh, monkeypatch):
    service = fresh()
    slow_down(service, 0.01)
    _, events = submit(service, max_completion_tokens=60)
    events.get(timeout=10)
    with monkeypatch.context() as patch:
        patch.setattr(service.worker, "_end_late_jobs", lambda: 1 / 0)
        assert outcome(events).status == 500
    assert outcome(submit(service)[1]) == expected(service, "hello", [picture()], max_new_tokens=12)


def test_what_waits_or_takes_too_long_is_refused(fresh):
    service = fresh(max_rows=1, waiting_seconds=0.15, total_seconds=0.6)
    slow_down(service, 0.05)
    long, waiting = (submit(service, max_completion_tokens=80)[1] for _ in range(2))
    assert outcome(waiting).status == 429
    assert outcome(long).status == 408


@pytest.mark.parametrize(
    ("suspect", "status", "words"),
    [(False, 429, "has waited for 50 seconds"), (True, 408, "took longer than 50 seconds")],
)
def test_what_waits_ends_with_its_time_in_total(fresh, suspect, status, words):
    service = fresh(max_rows=1, waiting_seconds=1000, total_seconds=50)
    slow_down(service, 0.02)
    running, events = submit(service, max_completion_tokens=80)
    events.get(timeout=10)
    told = queue.Queue()
    waiting = service.prepare(ChatRequest.model_validate(chat()), told.put)
    waiting.arrived, waiting.suspect = waiting.arrived - 60, suspect
    service.worker.submit(waiting)
    error = outcome(told)
    assert (error.status, words in str(error)) == (status, True)
    assert not running.ended


def test_a_request_that_came_too_late_to_be_prepared_is_refused(fresh):
    service = fresh(waiting_seconds=1000, total_seconds=50)
    with pytest.raises(RequestError, match="has waited for 50 seconds"):
        service.prepare(ChatRequest.model_validate(chat()), print, time.monotonic() - 60)


def test_draining_refuses_what_waits_and_finishes_what_runs(fresh):
    service = fresh(max_rows=1)
    slow_down(service, 0.01)
    running, events = submit(service)
    waiting = submit(service)[1]
    wait_until(lambda: running.started)
    service.worker.drain()
    assert outcome(waiting).code == "shutting_down"
    assert outcome(events) == expected(service, "hello", [picture()], max_new_tokens=12)
    with pytest.raises(RequestError, match="shutting down"):
        submit(service)


def test_stopping_ends_the_thread_and_tells_everyone(fresh):
    service = fresh()
    slow_down(service, 0.05)
    job, events = submit(service, max_completion_tokens=80)
    wait_until(lambda: job.started)
    service.stop()
    assert outcome(events).code == "shutting_down"
    assert not service.worker.alive


def test_more_answers_than_rows_wait_for_each_other(fresh):
    service, together, wanted = fresh(max_rows=2), [], (1, 1, 2, 3, 1)
    slow_down(service, 0.001, lambda: together.append((value(service, "twigvlm_rows"), jobs_with_rows(service))))
    jobs = [submit(service, f"question {at}", n=n, temperature=0.7, seed=at) for at, n in enumerate(wanted)]
    answers = [answers_of(job, events) for job, events in jobs]
    assert max(rows for rows, _ in together) == 3  # those of one request that asks for more
    assert max(rows for rows, jobs in together if jobs > 1) == 2
    for at, (n, answer) in enumerate(zip(wanted, answers, strict=True)):
        assert answer == answers_of(*submit(service, f"question {at}", n=n, temperature=0.7, seed=at))


def jobs_with_rows(service):
    return len(service.worker._jobs())


def answers_of(job, events):
    """The ids of each answer."""
    ids, finished = {number: [] for number in range(len(job.choices))}, set()
    while len(finished) < len(job.choices):
        event = events.get(timeout=20)
        ids[event.choice] += [token for token, _ in event.tokens]
        if event.finished:
            finished.add(event.choice)
    return ids


def test_who_gives_up_a_failed_job_gives_up_no_other(fresh):
    """The next engine numbers its rows as the failed one did."""
    model = tiny_model()
    service = fresh(model, max_rows=1)
    slow_down(service, 0.02)
    break_engines(model, "verify", [True], RuntimeError("a broken kernel"))
    bad, told = submit(service)
    _, good = submit(service, "question")
    assert outcome(told).status == 500
    wait_until(lambda: jobs_with_rows(service))
    service.worker.cancel(bad)  # as the end of its connection does
    assert outcome(good) == expected(service, "question", [picture()], max_new_tokens=12)
