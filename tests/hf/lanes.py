"""Three prompts as one padded batch, and the processors and criteria that `generate` makes of options for it."""

import torch

from tests.batches import batched
from tests.tiny import VOCABULARY, prompt
from twigvlm.hf.processors import split_processors
from twigvlm.hf.stopping import split_criteria

NEW = 9
ALONE = [prompt(1, 2, 3), prompt(2, 7, 6), prompt(3, 4, 4)]
BATCH = batched(ALONE)
PADDED = BATCH["input_ids"]
PADDING = (BATCH["attention_mask"] == 0).sum(dim=1).tolist()
WIDTH = PADDED.shape[1]
ENDS = {"eos_token_id": [5, 6], "pad_token_id": 0}


def captured(hf_model, inputs, **options):
    """Ids, processors, criteria and the configuration that Hugging Face's `generate` hands to its loop."""
    found = []

    def loop(_, input_ids, logits_processor, stopping_criteria, generation_config, **__):
        found.append((input_ids, logits_processor, stopping_criteria, generation_config))
        return input_ids

    hf_model.generate(**inputs, custom_generate=loop, **{"max_new_tokens": NEW, "do_sample": False, **options})
    return found[0]


def lanes_of(hf_model, inputs=BATCH, padding=PADDING, **options):
    ids, processors, _, config = captured(hf_model, inputs, **options)
    return split_processors(processors, ids, padding, config, VOCABULARY)


def lanes_in_order(lanes):
    return [(stage.lane, [type(one) for one in stage.processors[0]]) for stage in lanes.stages]


def random_scores(rows, seed):
    scores = 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    scores[:, 20] = -torch.inf
    return scores


def new_tokens(count, seed):
    return torch.randint(2, 12, (1, count), generator=torch.Generator().manual_seed(seed))


def stopping_of(hf_model, inputs=BATCH, padding=PADDING, **options):
    ids, _, criteria, _ = captured(hf_model, inputs, **options)
    return split_criteria(criteria, ids, padding)
