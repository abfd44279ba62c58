"""Which property is tested on which family, as a markdown table, from the tests that pytest finds.

python -m tests.table
"""

import contextlib
import io
from typing import Any

import pytest

FILES = ["tests/test_families.py", "tests/test_family_twigs.py", "tests/test_loading.py"]
PROPERTIES: dict[str, tuple[str, dict[str, Any]]] = {
    "R = M, K_f = L is `generate`: images": ("test_keeping_everything_is_plain_generate", {"kind": "images"}),
    "… a video": ("test_keeping_everything_is_plain_generate", {"kind": "video"}),
    "… no image": ("test_keeping_everything_is_plain_generate", {"kind": "text"}),
    "… eager": ("test_keeping_everything_is_plain_generate", {"attention": "eager"}),
    "… SDPA": ("test_keeping_everything_is_plain_generate", {"attention": "sdpa"}),
    "pruning hides tokens, nothing else": ("test_pruning_hides_tokens_and_nothing_else", {}),
    "what is chosen again is seen, nothing else": ("test_tokens_that_are_chosen_again_are_seen", {}),
    "chain, tree, auto change nothing": ("test_speculation_changes_nothing", {}),
    "scores are the attention": ("test_scores_are_the_base_s_own_attention", {}),
    "budget per image": ("test_a_budget_is_split_among_images", {}),
    "batch": ("test_rows_of_a_batch_are_as_if_alone", {}),
    "conversation": ("test_a_conversation_goes_on_as_one_prompt", {}),
    "`disabled()` is the base": ("test_disabled_is_the_base", {}),
    "save, load": ("test_saved_and_loaded_answers_alike", {}),
    "bfloat16": ("test_bfloat16_runs", {}),
    "a step of each stage": ("test_a_step_of_each_stage_changes_the_twig_and_nothing_else", {}),
    "two devices": ("test_layers_on_two_devices", {}),
}
"""Column -> test function and parameters: a family has a tick if there is such a test of it."""


class Found:
    """A pytest plugin that keeps what is collected."""

    items: tuple[Any, ...] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = tuple(item for item in session.items if hasattr(item, "callspec"))


def tick(items: tuple[Any, ...], family: str, function: str, wanted: dict[str, Any]) -> str:
    wanted = {**wanted, "name": family}
    runs = (
        item.originalname == function and wanted.items() <= item.callspec.params.items() and not skipped(item)
        for item in items
    )
    return "✓" if any(runs) else ""


def skipped(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(mark) for mark in ("skip", "skipif", "xfail"))


def main() -> None:
    found = Found()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "--quiet", *FILES], plugins=[found])
    from tests.families import TINY  # pytest complains of plugins' modules that were imported before it

    print(f"| family | {' | '.join(PROPERTIES)} |")
    print(f"| --- | {' | '.join([':-:'] * len(PROPERTIES))} |")
    for family in TINY:
        ticks = [tick(found.items, family, function, wanted) for function, wanted in PROPERTIES.values()]
        print(f"| `{family}` | {' | '.join(ticks)} |")


if __name__ == "__main__":
    main()
