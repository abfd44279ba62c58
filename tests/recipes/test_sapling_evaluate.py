"""What Sapling's own evaluation counts."""

from recipes.sapling.evaluate import Tally
from recipes.sapling.questions import LONG_KINDS, evaluation_turns
from recipes.sapling.scenes import make_scene

SCENE = next(scene for scene in (make_scene("test", index) for index in range(99)) if len(scene.signs) == 2)
TURNS = evaluation_turns(SCENE, 4)


def test_true_answers_count_as_right():
    tally = Tally()
    for turn in TURNS:
        if turn.kind == "description":
            tally.description(SCENE, turn.answer)
        else:
            tally.exact(turn, turn.answer)
    table = tally.table()
    assert "| **all short answers** | 4 | **100.0 %** |" in table
    assert "recall 100.0 %, precision 100.0 %" in table
    assert "| signs quoted in descriptions | 2 | 100.0 % |" in table
    assert all(f"| {turn.kind}" in table for turn in TURNS if turn.kind in LONG_KINDS[1:])


def test_what_is_missed_and_what_is_invented_both_count():
    tally = Tally()
    absent = next(kind for kind in ("dog", "cat", "bee") if kind not in TURNS[-1].answer)
    tally.description(SCENE, f"There is a {absent}. A red sign reads {SCENE.signs[0].text}X.")
    tally.exact(TURNS[0], "something else")
    assert (tally.found, tally.claimed, tally.quoted, tally.written) == (0, 1, 0, 2)
    assert "**0.0 %**" in tally.table()
