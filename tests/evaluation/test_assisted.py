import time
from copy import deepcopy

import pytest
import torch

from tests import families
from tests.evaluation.conftest import inputs_of
from tests.tiny import prompt, tiny_llava
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.assisted import AssistedSteps, check_assistant
from twigvlm.evaluation.results_log import ResultsLog
from twigvlm.evaluation.speed import FirstToken, measure, run_speed
from twigvlm.evaluation.systems import System, drafting_ways, named_systems
from twigvlm.model import TwigVLM

LOOKUP = System("HF prompt lookup", "sdpa", {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2})
ASSISTANT = System("HF assistant", "sdpa", assisted=True)
PLAIN = System("HF generate, sdpa", "sdpa")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_transformers_own_speculation_repeats_the_answer_and_is_counted(name):
    base = families.tiny(name)
    model = TwigVLM.grow(base, TwigConfig(families.TRUNK, families.TWIG))
    inputs = families.prompt(base, name, "images")
    plain = measure(model, inputs, PLAIN, 24)
    assert plain.drafted == plain.accepted == []
    for system, assistant in ((LOOKUP, None), (ASSISTANT, deepcopy(base))):
        one = measure(model, inputs, system, 24, assistant)
        assert one.ids == plain.ids
        assert all(accepted <= drafted for drafted, accepted in zip(one.drafted, one.accepted, strict=True))
        assert sum(one.accepted) + len(one.accepted) == 24  # each step adds one token of the base's own
        assert one.draft is None
    assert one.accepted == one.drafted  # the assistant is the base, and sees what it sees
    assert sum(one.accepted) > 0


def test_what_stands_before_an_image_may_end_a_prompt(model):
    inputs = prompt(1)
    inputs["input_ids"][0, -1] = inputs["input_ids"][0, 2]  # the token before the image
    one = measure(model, inputs, LOOKUP, 8)
    assert one.ids == measure(model, inputs, PLAIN, 8).ids
    assert one.drafted[0] == 0


def test_a_step_is_counted_until_base_and_draft_part():
    steps = AssistedSteps(FirstToken(time.monotonic))
    model = torch.nn.Module()
    model.forward = lambda input_ids: None
    with steps.watching(model):
        for ids in ([5, 6, 7, 1, 2], [3, 4, 5], [9], [9, 1, 0, 8]):
            model(input_ids=torch.tensor([ids]))
    model(input_ids=torch.tensor([[1]]))  # is no longer watched
    for new in ([5, 6, 7], [1, 2, 3], [4, 6], [9], [1, 0]):  # the last step ends with an end token that was drafted
        steps.put(torch.tensor(new))
    assert steps.counts() == ([2, 2, 0, 3], [2, 1, 0, 2])


def test_an_assistant_is_timed_beside_the_others(model, tokenizer, questions, tmp_path):
    systems = named_systems(["HF assistant"], 10, drafting_ways({"draft_length": 4}, {}, 2), ["sdpa"], assistant=True)
    assert [system.name for system in systems] == ["HF generate, sdpa", "HF assistant"]
    assert [system.is_baseline for system in systems] == [True, False]
    log = ResultsLog(tmp_path / "results.jsonl", {})
    assistant = tiny_llava(1, layers=2)
    records = run_speed(model, tokenizer, questions, systems, inputs_of, log, 4, 4, 1, assistant=assistant)
    for record in records:
        runs = record["runs"]
        assert runs["HF assistant"]["ids"] == runs["HF generate, sdpa"]["ids"]
        assert sum(runs["HF assistant"]["drafted"]) > 0
    with pytest.raises(TwigVLMError, match=r"system 'HF assistant': .*needs assistant"):
        named_systems(["HF assistant"], 10, drafting_ways({"draft_length": 4}, {}, 2), ["sdpa"])


def test_assistants_that_cannot_help_are_refused(model):
    other, foreign = tiny_llava(1, layers=2), tiny_llava(1, layers=2)
    other.config.image_token_id = 98
    with pytest.raises(TwigVLMError, match="assistant 'small': its image_token_id is 98, the base's 99"):
        check_assistant(model.base, other, "small")
    foreign.config.text_config.vocab_size = 200
    with pytest.raises(TwigVLMError, match="assistant 'small': has a vocabulary of 200 tokens, the base one of 100"):
        check_assistant(model.base, foreign, "small")
    check_assistant(model.base, tiny_llava(1, layers=2), "small")


def test_what_transformers_refuses_is_one_line(model):
    text = model.model.model.language_model  # has no head to draft with
    with pytest.raises(TwigVLMError, match="system 'HF assistant': transformers' generate cannot run it on this base"):
        measure(model, prompt(), ASSISTANT, 4, text)
    exits = System("early exit", "sdpa", {"assistant_early_exit": 2, "prompt_lookup_num_tokens": 4})
    with pytest.raises(TwigVLMError, match=r"system 'early exit': .*num_hidden_layers"):
        measure(model, prompt(), exits, 4)
