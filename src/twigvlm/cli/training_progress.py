"""Show a Trainer's progress on stderr."""

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from twigvlm.cli.output import progress
from twigvlm.training.fit import NO_LOSSES


class TrainingProgress(TrainerCallback):
    """Prints a line per log and, if stderr is a terminal, shows a progress bar. As a context, it removes the bar at the end."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar = progress()
        self._task = self._bar.add_task(title)

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance by one optimiser step."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the loss and its terms."""
        entry = state.log_history[-1]
        if "loss" not in entry or not state.is_world_process_zero:
            return
        self._bar.update(self._task, description=f"{self._title}, loss {entry['loss']:.3f}")
        terms = [f"{name} {value:.4f}" for name, value in entry.items() if name not in NO_LOSSES]
        line = f"step {state.global_step}/{state.max_steps} {' '.join(terms)}"
        if self._bar.disable:
            print(line, file=sys.stderr)
        else:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
