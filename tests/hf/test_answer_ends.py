"""Where an answer ends within a draft, nothing of the caller's is asked what follows."""

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tests.batches import batched
from tests.hf.test_generate_options import NEW, Recording, all_ways
from tests.tiny import prompt


class FirstRow(StoppingCriteria):
    """Ends the first answer after some tokens."""

    def __init__(self, count):
        self.length = prompt()["input_ids"].shape[1] + count

    def __call__(self, input_ids, scores, **_):
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        ended[0] = input_ids.shape[1] >= self.length
        return ended


@pytest.mark.parametrize("place", [2, 5])
@pytest.mark.parametrize("ending", ["eos", "criterion"])
def test_processors_are_never_asked_what_follows_the_end_of_an_answer(model, place, ending):
    plain = model.model.generate(**prompt(), max_new_tokens=NEW)[0, -NEW:].tolist()
    made = []

    def options():
        made.append(Recording())
        end = {"eos_token_id": plain[place]}
        if ending == "criterion":
            end = {"stopping_criteria": StoppingCriteriaList([FirstRow(place + 1)]), "eos_token_id": None}
        return {"max_new_tokens": NEW, "logits_processor": LogitsProcessorList([made[-1]]), **end}

    base, *ours = all_ways(model, prompt(), options)
    assert base.shape[1] < prompt()["input_ids"].shape[1] + NEW
    assert [one.tolist() for one in ours] == [base.tolist()] * 3
    assert [one.calls for one in made[1:]] == [made[0].calls] * 3


@pytest.mark.parametrize(
    "way", [{"speculate": "chain", "draft_threshold": 0.0}, {"speculate": "tree", "tree_nodes": 20}]
)
def test_processors_of_a_batch_see_padding_behind_a_row_that_a_criterion_ended(model, way):
    inputs = batched([prompt(), prompt(seed=1)])
    seen = []

    def options(speculation):
        seen.append([])

        def note(ids, scores, calls=seen[-1]):
            calls.append(ids[:, -NEW:].tolist())
            return scores

        criteria = StoppingCriteriaList([FirstRow(3)])
        return {"max_new_tokens": NEW, "logits_processor": [note], "stopping_criteria": criteria, **speculation}

    plain, drafted = (model.generate(**inputs, **options(each)) for each in ({}, way))
    assert torch.equal(plain, drafted)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 3
