"""What `auto` charges an answer for the prompt that the twig has not seen yet."""

import torch

from tests.engine.engines import engine_on, make_runner
from tests.tiny import prompt
from tests.twigs import grown, step_costs
from twigvlm.kv.prefix_cache import PrefixCache


def test_a_turn_pays_for_what_the_twig_has_not_seen_of_the_conversation():
    """To show the twig the whole prompt does not pay within so short an answer; the three new tokens do."""
    model, first = grown(), prompt(0)
    ids = torch.cat((first["input_ids"], torch.tensor([[5, 6, 7]])), dim=1)
    turn = {**first, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def drafted(**options):
        engine = engine_on(model, make_runner(model, False, "auto", step_costs(fill=3.0)))
        engine.add(turn, max_new_tokens=12, **options)
        row = engine.waiting[0]
        list(engine.stream())
        return sum(row.drafted)

    memory = PrefixCache()
    model.generate(**first, max_new_tokens=2, speculate="chain", memory=memory)
    assert drafted() == 0
    assert drafted(memory=memory) > 0
