"""SparseVLM from the prompt to the logits, against a plain version that drops and merges token by token."""

import torch

from tests.families import IMAGE, LAYERS, VIDEO, tiny
from tests.pruning.references import peaks
from twigvlm import TwigVLM
from twigvlm.base.masks import causal_mask
from twigvlm.pruning.methods.sparsevlm import SparseVLM

IMAGES, PATCHES, RETAIN = 6, 16, 30
SIZES = [(27, 3), (19, 1), (10, 1)]  # behind each cut: tokens that stay as they are, and clusters of others


def six_images():
    """A prompt with enough visual tokens for several clusters of recycled ones."""
    generator, parts = torch.Generator().manual_seed(0), []
    for _ in range(IMAGES):
        parts += [torch.randint(2, VIDEO, (1, 2), generator=generator), torch.full((1, PATCHES), IMAGE)]
    ids = torch.cat((*parts, torch.randint(2, VIDEO, (1, 9), generator=generator)), dim=1)
    pixels = torch.randn(IMAGES, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def run_layer(base, index, hidden, positions):
    """The states after a layer, and its attention, mean over heads."""
    maps = []
    hook = base.layers[index].self_attn.register_forward_hook(lambda *call: maps.append(call[2][1]))
    mask = torch.zeros(len(hidden), len(hidden)).masked_fill(~causal_mask(len(hidden), len(hidden)), torch.finfo().min)
    rotary = base.decoder.rotary_emb(hidden[None], positions[None])
    after = base.layers[index](hidden[None], attention_mask=mask[None, None], position_embeddings=rotary)[0]
    hook.remove()
    return after, maps[0][0].mean(dim=0)


def raters_of(hidden, visual):
    """Positions of the text behind the last image that the image is about."""
    text = list(range(max(visual) + 1, len(hidden)))
    given = torch.stack([(hidden[text] @ hidden[j]).softmax(0) for j in visual]).mean(0)
    return [position for position, share in zip(text, given, strict=True) if share > given.mean()]


def reduced(states, scores, visual, count, clusters):
    """States by position: of the `count` best visual tokens, and the means of clusters of the next best 30 % and one more."""
    order = sorted(visual, key=lambda position: -scores[position])
    dropped = len(visual) - count
    recycled = sorted(order[count : count + int(0.3 * dropped) + 1])
    left = {position: states[position] for position in order[:count]}
    centers, cluster = peaks(torch.stack([states[position] for position in recycled]), clusters)
    for number, center in enumerate(centers):
        members = [states[position] for position, of in zip(recycled, cluster, strict=True) if of == number]
        left[recycled[center]] = torch.stack(members).mean(0)
    return left


@torch.no_grad()
def plain_logits(base, inputs):
    """Logits behind the prompt, with cuts after layers 1, 2 and 3."""
    captured = base.prompt(**inputs)
    states = dict(enumerate(captured.hidden[0]))
    visual = captured.visual_mask[0].nonzero()[:, 0].tolist()
    asking = raters_of(captured.hidden[0], visual)
    for index in range(LAYERS):
        positions = sorted(states)
        hidden, attention = run_layer(base, index, torch.stack([states[p] for p in positions]), torch.tensor(positions))
        states = dict(zip(positions, hidden, strict=True))
        if index < len(SIZES):
            rows = attention[[positions.index(position) for position in asking]].sum(0)
            scores = dict(zip(positions, rows.tolist(), strict=True))
            left = reduced(states, scores, visual, *SIZES[index])
            states = {p: left.get(p, state) for p, state in states.items() if p not in visual or p in left}
            visual = sorted(left)
    return base.logits(states[max(states)][None])[0]


def test_sparsevlm_with_recycling_is_the_plain_version():
    model, inputs, logits = TwigVLM.without_twig(tiny("llava", "eager")), six_images(), []

    def record(_ids, scores):
        logits.append(scores[0].clone())
        return scores

    cuts = SparseVLM().cuts(RETAIN, IMAGES * PATCHES, LAYERS)
    assert [(cut.layer, cut.keep) for cut in cuts] == [(n + 1, sum(size)) for n, size in enumerate(SIZES)]
    model.generate(**inputs, pruner=SparseVLM(), retain=RETAIN, max_new_tokens=1, logits_processor=[record])
    torch.testing.assert_close(logits[0], plain_logits(model.base, inputs), rtol=1e-4, atol=1e-4)
