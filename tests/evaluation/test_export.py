import json
from collections import Counter

from PIL import Image

from recipes.sapling.questions import LONG_KINDS, Options, evaluation_turns, llava_sample, main
from recipes.sapling.scenes import make_scene
from twigvlm.evaluation.questions import Namer, load_questions


def test_the_recipe_exports_questions_that_can_be_read(tmp_path):
    options = Options(tmp_path, "validation", count=7, evaluation=True, descriptions=3, long=2, per_scene=3)
    main(options)
    questions = load_questions(tmp_path / "questions.json")
    assert questions.split == "validation"
    kinds = Counter(item.kind if item.kind in LONG_KINDS else "short" for item in questions.items)
    assert kinds == {"short": 7, "description": 3} | {kind: 2 for kind in LONG_KINDS if kind != "description"}
    named = Namer(questions.vocabulary)
    for item in questions.items:
        scene = make_scene("validation", int(item.id.split("-")[1]))
        assert (item.prompt, item.answer) in {(turn.question, turn.answer) for turn in evaluation_turns(scene, 3)}
        assert item.long == (item.kind in LONG_KINDS and item.kind != "description")
        if item.kind == "description":  # its own answer names exactly what is there
            assert named(item.answer) == set(item.objects)
            assert set(item.texts) == {sign.text for sign in scene.signs}
        else:
            assert item.objects is None


def test_conversations_are_exported_in_the_order_of_their_scenes(tmp_path):
    main(Options(tmp_path, split="train", count=3))
    names = [f"train-{index:06d}.jpg" for index in range(3)]
    wanted = [llava_sample(make_scene("train", index), name) for index, name in enumerate(names)]
    assert json.loads((tmp_path / "conversations.json").read_text()) == wanted
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (336, 336)
