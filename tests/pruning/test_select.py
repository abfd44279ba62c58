"""Selection against a plain sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.base.packing import left_pack
from twigvlm.pruning.select import best_first, best_of_each_image, evenly, gather_tokens, top_visual


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=30), st.data())
def test_best_visual_tokens_in_order_and_all_text(tokens, data):
    visual = [is_visual for is_visual, _ in tokens]
    keep = data.draw(st.integers(0, sum(visual)))
    scores = torch.tensor([[float(score) for _, score in tokens]])
    mask = torch.tensor([visual])
    chosen = top_visual(scores, mask, [keep])
    indices, lengths = left_pack(chosen | ~mask)
    kept = indices[0].tolist()
    ranked = sorted((i for i in range(len(tokens)) if visual[i]), key=lambda i: (-tokens[i][1], i))
    assert kept == sorted(ranked[:keep] + [i for i in range(len(tokens)) if not visual[i]])
    assert lengths == (len(kept),)
    assert chosen[0].nonzero()[:, 0].tolist() == sorted(ranked[:keep])
    hidden = torch.randn(1, len(tokens), 3)
    assert torch.equal(gather_tokens(hidden, torch.tensor([kept], dtype=torch.long)), hidden[:, kept])


def test_scores_of_text_do_not_matter_and_nan_ranks_last():
    scores = torch.tensor([[float("nan"), 9.0, -1.0, -2.0]])
    mask = torch.tensor([[True, False, True, True]])
    assert top_visual(scores, mask, [2]).nonzero()[:, 1].tolist() == [2, 3]


def test_the_best_come_first_and_nan_is_no_better_than_the_worst():
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[nan, 1.0, inf, -inf, 1.0], [0.0, 0.0, 3e38, nan, -3e38]])
    assert best_first(scores).tolist() == [[2, 1, 4, 0, 3], [2, 0, 1, 4, 3]]
    assert best_first(scores.half())[0].tolist() == [2, 1, 4, 0, 3]
    assert best_first(torch.tensor([3, 5, 3])).tolist() == [1, 0, 2]


def test_of_each_image_what_has_no_score_stays_last_and_what_has_an_endless_one_first():
    scores = torch.tensor([[float("nan"), 1.0, float("inf"), 9.0, 2.0, float("-inf"), float("nan"), 3e38]])
    mask = torch.tensor([[True, True, True, False, True, True, True, True]])
    order = evenly(scores, mask).masked_fill(~mask, float("-inf"))[0].argsort(descending=True)[:7].tolist()
    assert order == [2, 7, 4, 1, 0, 5, 6]  # round by round, and -inf as the least
    for keep, kept in ((2, [2, 7]), (4, [1, 2, 4, 7])):
        assert best_of_each_image(scores, scores[..., None], mask, [keep]).nonzero()[:, 1].tolist() == kept


def test_each_row_of_a_batch_has_its_own_choice():
    scores = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.0, 3.0, 2.0, 1.0]])
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    assert top_visual(scores, mask, [1, 2]).tolist() == [[False, False, True, False], [False, True, True, False]]


def test_more_than_there_are_cannot_be_kept():
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] visual tokens cannot keep \[2, 2\]"):
        top_visual(torch.zeros(2, 2), torch.tensor([[True, False], [True, True]]), [2, 2])


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
def test_packing_puts_each_rows_own_first_and_in_order(rows):
    order, lengths = left_pack(torch.tensor(rows))
    assert order.shape[1] == max(lengths)
    for row, indices, length in zip(rows, order.tolist(), lengths, strict=True):
        assert indices[:length] == [place for place, stays in enumerate(row) if stays]
        assert len(set(indices)) == len(indices)


@given(
    st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=12, max_size=12), min_size=1, max_size=3),
    st.data(),
)
def test_an_even_split_goes_round_the_images(rows, data):
    visual = torch.tensor([[is_visual for is_visual, _ in row] for row in rows])
    scores = torch.tensor([[float(score) for _, score in row] for row in rows])
    keep = [data.draw(st.integers(0, int(row.sum()))) for row in visual]
    chosen = top_visual(evenly(scores, visual), visual, keep)
    for row, (marks, count) in enumerate(zip(visual.tolist(), keep, strict=True)):
        images, before = [], False
        for place, is_visual in enumerate(marks):
            if is_visual and not before:
                images.append([])
            if is_visual:
                images[-1].append(place)
            before = is_visual
        for image in images:
            image.sort(key=lambda place: (-scores[row, place].item(), place))
        taken = [sum(chosen[row, place].item() for place in image) for image in images]
        assert sum(taken) == count
        for image, number in zip(images, taken, strict=True):
            assert all(chosen[row, place] for place in image[:number])  # of each image its best
            assert number == len(image) or number >= max(taken) - 1  # and of none two fewer than of another
