"""Which earlier prompt serves a request, and how much is kept."""

import torch

from tests.tiny import IMAGE_TOKEN
from twigvlm.base.prompt import Prompt
from twigvlm.kv import prefix_pool
from twigvlm.kv.prefix_cache import Pictures, PrefixCache
from twigvlm.kv.prefix_pool import PrefixPool


def inputs_of(ids, *pictures):
    """Inputs of a prompt; of each picture, every pixel has one value."""
    pixels = {"pixel_values": torch.tensor(pictures)[:, None]} if pictures else {}
    return {"input_ids": torch.tensor([ids]), **pixels}


def seen(pool, ids, *pictures):
    """Take a prompt from the pool as a request does, and keep it."""
    inputs = inputs_of(ids, *pictures)
    shown = Pictures(inputs)
    prefix = pool.take(inputs["input_ids"], shown)
    prefix.show(shown)
    states = torch.zeros(1, len(ids), 4)
    tensor = inputs["input_ids"]
    prompt = Prompt(states, torch.arange(len(ids))[None], tensor == IMAGE_TOKEN, tensor, (len(ids),))
    prefix.prompt, prefix.hidden = prompt, states
    pool.keep(prefix, shown)
    return prefix


def known(pool, ids, *pictures):
    inputs = inputs_of(ids, *pictures)
    return pool.take(inputs["input_ids"], Pictures(inputs)).known(inputs["input_ids"])


def test_the_longest_common_beginning_serves():
    pool = PrefixPool(10**6)
    seen(pool, [1, 2, 3], 0.0)
    seen(pool, [1, 2, 4, 5, 6], 0.0)
    assert known(pool, [1, 2, 4, 5, 7], 0.0) == 4
    assert known(pool, [1, 2, 3, 9], 0.0) == 3
    assert known(pool, [8, 2, 3], 0.0) == 0


def test_other_pictures_have_other_states():
    pool = PrefixPool(10**6)
    seen(pool, [1, IMAGE_TOKEN, 3], 0.0)
    assert known(pool, [1, IMAGE_TOKEN, 3, 4], 1.0) == 0
    assert known(pool, [1, IMAGE_TOKEN, 3, 4], 0.0) == 3
    assert known(pool, [1, IMAGE_TOKEN, 3, IMAGE_TOKEN, 4], 0.0, 1.0) == 3, "a further picture may follow"


def test_what_is_taken_is_not_what_is_kept():
    pool = PrefixPool(10**6)
    seen(pool, [1, 2, 3])
    inputs = inputs_of([1, 2, 3, 4])
    taken = pool.take(inputs["input_ids"], Pictures(inputs))
    taken.layers[0] = torch.zeros(1), torch.zeros(1)
    taken.forget()
    assert known(pool, [1, 2, 3, 4]) == 3
    assert not pool.take(inputs["input_ids"], Pictures(inputs)).layers


def test_what_was_emptied_gives_way():
    """As by a second answer to a kept prompt whose prefill fails."""
    pool = PrefixPool(10**6)
    seen(pool, [1, 2, 3]).forget()
    assert known(pool, [1, 2, 3, 4]) == 0
    seen(pool, [5, 6, 7])
    assert len(pool) == 1
    assert known(pool, [5, 6, 7, 8]) == 3


def test_a_conversation_takes_up_one_place():
    pool = PrefixPool(10**6)
    turns = [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]
    for ids in turns:
        last = seen(pool, ids, 0.0)
    assert pool.bytes == last.bytes()
    seen(pool, [1, 2], 1.0)  # begins with the same text, but shows something else
    assert pool.bytes > last.bytes()


def test_the_least_recently_used_give_way():
    size = seen(PrefixPool(10**6), [1, 2, 3]).bytes()
    pool = PrefixPool(2 * size)
    seen(pool, [1, 2, 3])
    seen(pool, [4, 5, 6])
    assert known(pool, [1, 2, 3, 9]) == 3  # used again
    seen(pool, [7, 8, 9])
    assert pool.bytes == 2 * size
    assert known(pool, [4, 5, 6, 9]) == 0
    assert known(pool, [1, 2, 3, 9]) == known(pool, [7, 8, 9, 1]) == 3
    pool.clear()
    assert pool.bytes == 0


def test_a_conversation_may_bring_further_pictures():
    pool = PrefixPool(10**6)
    seen(pool, [1, IMAGE_TOKEN, 3], 0.0)
    last = seen(pool, [1, IMAGE_TOKEN, 3, IMAGE_TOKEN, 4], 0.0, 1.0)
    assert pool.bytes == last.bytes()


def test_a_prompt_larger_than_the_pool_leaves_the_others_there():
    size = seen(PrefixPool(10**6), [1, 2, 3]).bytes()
    pool = PrefixPool(3 * size)
    seen(pool, [1, 2, 3])
    seen(pool, list(range(4, 34)))
    assert known(pool, [1, 2, 3, 9]) == 3
    assert known(pool, [4, 5, 6, 9]) == 0


def test_without_room_nothing_is_kept_and_nothing_computed():
    inputs = inputs_of([1, 2, 3], 0.0)
    assert PrefixPool(0).take(inputs["input_ids"], Pictures(inputs)) is None
    pool = PrefixPool(1)
    seen(pool, [1, 2, 3])
    assert pool.bytes == 0
    assert known(pool, [1, 2, 3, 4]) == 0


def test_a_prompt_that_was_not_computed_is_not_kept():
    pool = PrefixPool(10**6)
    pool.keep(PrefixCache(), Pictures({}))
    assert pool.bytes == 0


def test_no_more_prompts_are_kept_than_a_request_is_compared_with(monkeypatch):
    monkeypatch.setattr(prefix_pool, "MAX_PROMPTS", 5)
    pool = PrefixPool(10**9)
    for first in range(20, 40):
        seen(pool, [first, 2, 3])
    assert len(pool) == 5
    assert known(pool, [39, 2, 3]) == 3
    assert known(pool, [20, 2, 3]) == 0
