"""Accuracies to show while an evaluation runs."""

from twigvlm.evaluation.results_log import Record


class Progress:
    """Exact match of each variant so far; `str` gives it as one line."""

    def __init__(self, max_shown: int = 6) -> None:
        self.asked = 0
        self.right: dict[str, int] = {}
        self._max_shown = max_shown

    def add(self, record: Record) -> None:
        """Count a record, unless it is of a description or a failed question."""
        scores = {name: value for name, value in record.get("score", {}).items() if not isinstance(value, list)}
        self.asked += bool(scores)
        for name, right in scores.items():
            self.right[name] = self.right.get(name, 0) + right

    def __str__(self) -> str:
        """The first variants with their exact match in percent."""
        shown = list(self.right.items())[: self._max_shown]
        return " · ".join(f"{name} {100 * right / self.asked:.1f}" for name, right in shown)
