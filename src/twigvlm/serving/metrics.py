"""Counters, gauges and histograms in Prometheus' text format."""

from bisect import bisect_left
from threading import Lock

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """A set of named metrics; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._help: dict[str, tuple[str, str]] = {}
        self._values: dict[str, dict[str, float]] = {}
        self._buckets: dict[str, list[int]] = {}

    def counter(self, name: str, text: str) -> None:
        """Declare a number that only grows."""
        self._declare(name, "counter", text)

    def gauge(self, name: str, text: str) -> None:
        """Declare a number that goes up and down."""
        self._declare(name, "gauge", text)

    def histogram(self, name: str, text: str) -> None:
        """Declare a distribution of seconds."""
        self._declare(name, "histogram", text)
        self._buckets[name] = [0] * (len(SECONDS) + 1)
        self._values[name] = {"sum": 0.0}

    def add(self, name: str, value: float = 1, label: str = "") -> None:
        """Add to a counter or a gauge, under a label such as `status="200"`."""
        with self._lock:
            values = self._values[name]
            values[label] = values.get(label, 0) + value

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name][""] = value

    def observe(self, name: str, seconds: float) -> None:
        """Add one value to a histogram."""
        with self._lock:
            self._buckets[name][bisect_left(SECONDS, seconds)] += 1
            self._values[name]["sum"] += seconds

    def text(self) -> str:
        """All metrics in Prometheus' exposition format 0.0.4."""
        with self._lock:
            lines: list[str] = []
            for name, (kind, text) in self._help.items():
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                if kind == "histogram":
                    lines += self._histogram_lines(name)
                    continue
                for label, value in sorted(self._values[name].items() or {"": 0.0}.items()):
                    lines.append(f"{name}{f'{{{label}}}' if label else ''} {value:.10g}")
            return "\n".join(lines) + "\n"

    def _histogram_lines(self, name: str) -> list[str]:
        lines, total = [], 0
        for bound, count in zip([*(f"{bound:g}" for bound in SECONDS), "+Inf"], self._buckets[name], strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._values[name]['sum']:.10g}", f"{name}_count {total}"]

    def _declare(self, name: str, kind: str, text: str) -> None:
        self._help[name] = kind, text
        self._values[name] = {}


def server_metrics() -> Metrics:
    """The metrics of a server, all declared and at 0."""
    metrics = Metrics()
    metrics.counter(
        "twigvlm_requests_total",
        "Requests to /v1/chat/completions by status, refused ones included; 499: the client hung up.",
    )
    metrics.gauge(
        "twigvlm_requests_waiting", "Requests without a token yet: being fetched, prepared, queued or prefilled."
    )
    metrics.gauge("twigvlm_rows", "Answers that are being generated.")
    metrics.counter("twigvlm_prompt_tokens_total", "Tokens of prompts, visual tokens included.")
    metrics.counter(
        "twigvlm_cached_prompt_tokens_total", "Tokens of prompts whose trunk states an earlier request had left."
    )
    metrics.counter(
        "twigvlm_generated_tokens_total",
        "New tokens, those included that come after a stop text and are in no answer; their rate is the speed in tokens "
        "per second.",
    )
    metrics.counter("twigvlm_steps_total", "Steps of rows; new tokens per step show what drafts bring.")
    metrics.counter("twigvlm_drafted_tokens_total", "Tokens that the twig drafted and the base verified.")
    metrics.counter("twigvlm_accepted_tokens_total", "Drafted tokens that the base accepted.")
    metrics.counter("twigvlm_visual_tokens_total", "Visual tokens of prompts.")
    metrics.counter("twigvlm_kept_visual_tokens_total", "Visual tokens that the first cut kept.")
    metrics.counter("twigvlm_engine_failures_total", "Steps that failed; the rows of such a step are generated again.")
    metrics.histogram("twigvlm_time_to_first_token_seconds", "From arrival to the first token.")
    metrics.histogram(
        "twigvlm_request_seconds",
        "From arrival to the end of an answer that has begun, also of one that failed or whose client hung up.",
    )
    return metrics
