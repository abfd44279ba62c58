import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.evaluation.token_origins import Origin, origins, pieces


@given(st.lists(st.integers(0, 6), max_size=12), st.booleans())
def test_every_token_has_its_origin(accepted, cut):
    """The reference commits token by token, as the decoding loop does."""
    wanted = []
    for step, count in enumerate(accepted):
        wanted.extend(Origin(step, True) for _ in range(count))
        if not (
            cut and count and step == len(accepted) - 1
        ):  # a draft that ends the answer leaves no room for the base
            wanted.append(Origin(step, False))
    found = origins(accepted, len(wanted))
    assert found == wanted
    assert [sum(one.drafted and one.step == step for one in found) for step in range(len(accepted))] == accepted
    assert [one.step for one in found] == sorted(one.step for one in found)
    for count in (sum(accepted) + len(accepted) + 1, sum(accepted) - 2):
        with pytest.raises(ValueError, match=f"^{count} tokens: accepted lengths"):
            origins(accepted, count)


def test_only_a_last_step_that_accepted_something_may_lack_the_base():
    with pytest.raises(ValueError, match="1 tokens"):
        origins([0, 0], 1)


@pytest.mark.parametrize("end", [None, "drafted", "chosen"])
def test_answers_of_a_model_add_up(end):
    model = TwigVLM.grow(tiny_llava(deep_scale=0.3, from_layer=3), TwigConfig(1, 2))
    inputs = prompt(1)
    length = inputs["input_ids"].shape[1]
    options = {"speculate": "chain", "draft_threshold": 0.0, "return_dict_in_generate": True, "max_new_tokens": 30}

    def answer(**more):
        output = model.generate(**inputs, **options, **more)
        tokens = output.sequences[0, length:].tolist()
        return tokens, origins(output.accepted_lengths[0], len(tokens))

    tokens, found = answer()
    assert len(tokens) == 30
    assert {one.drafted for one in found} == {True, False}
    if end is not None:  # end at a token's first occurrence, whose origin is known
        chosen = next(
            index
            for index, (token, one) in enumerate(zip(tokens, found, strict=True))
            if index and one.drafted == (end == "drafted") and token not in tokens[:index]
        )
        assert answer(eos_token_id=tokens[chosen]) == (tokens[: chosen + 1], found[: chosen + 1])


@given(st.text(max_size=20), st.data())
def test_pieces_join_to_the_whole_text(text, data):
    """Tokens are runs of bytes, as in byte-level vocabularies, cut anywhere, also inside a character."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
    tokens = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]

    def decode(ids):
        return b"".join(tokens[index] for index in ids).decode(errors="replace")

    found = pieces(range(len(tokens)), decode)
    assert len(found) == len(tokens)
    assert "".join(found) == text
