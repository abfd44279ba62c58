import json

from PIL import Image

from recipes.sapling.questions import Options, conversation, evaluation_file, llava_sample, main
from recipes.sapling.scenes import make_scene
from twigvlm.evaluation.questions import Namer, exact_match, load_questions


def test_the_recipe_exports_questions_that_can_be_read(tmp_path):
    evaluation_file(tmp_path, "validation", count=7, descriptions=3, per_scene=3)
    questions = load_questions(tmp_path / "questions.json")
    assert questions.split == "validation"
    short = [item for item in questions.items if item.objects is None]
    long = [item for item in questions.items if item.objects is not None]
    assert (len(short), len(long)) == (7, 3)
    assert all(item.kind == "description" for item in long)
    named = Namer(questions.vocabulary)
    for item in long:  # its own answer names exactly what is there
        assert named(item.answer) == set(item.objects)
    turns = {(turn.question, turn.answer) for i in range(3) for turn in conversation(make_scene("validation", i))}
    for item in questions.items:
        assert (item.prompt, item.answer) in turns
        assert exact_match(item.answer, item.answer)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_conversations_are_exported_in_the_order_of_their_scenes(tmp_path):
    main(Options(tmp_path, split="train", count=3))
    names = [f"train-{index:06d}.jpg" for index in range(3)]
    wanted = [llava_sample(make_scene("train", index), name) for index, name in enumerate(names)]
    assert json.loads((tmp_path / "conversations.json").read_text()) == wanted
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (336, 336)
