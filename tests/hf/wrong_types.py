"""Arguments of another kind than `generate` takes, as a user without a type checker gives them; prints what they are told.

Run as a program, since the tests' own process checks types at every call.
"""

import json

import torch
from transformers import GenerationConfig, LogitsProcessor

from tests.tiny import prompt, tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm import SpeculationConfig, TwigConfig, TwigVLM, TwigVLMError
from twigvlm.pruning.methods.fastv import FastV
from twigvlm.training.options import Stage1Config, Stage2Config

PROCESSOR = tiny_processor()
OF_GENERATE = {
    "final_wipe=4.5: must be a whole number": {"keep": 4, "final_wipe": 4.5},
    "final_wipe='4': must be a whole number": {"keep": 4, "final_wipe": "4"},
    "scout='no': must be True or False": {"keep": 4, "scout": "no"},
    "draft_threshold='0.6': must be a number": {"speculate": "chain", "draft_threshold": "0.6"},
    "pruner=5: is no pruning method": {"retain": 8, "pruner": 5},
    "pruner=FastV: is no pruning method": {"retain": 8, "pruner": FastV},
    "scorer='fastv': cannot be called": {"keep": 4, "scorer": "fastv"},
    "generation_config: is dict": {"generation_config": {"max_new_tokens": 2}},
    "logits_processor: is LogitsProcessor; pass a list": {"logits_processor": LogitsProcessor()},
    "takes (ids, scores, more)": {"logits_processor": [lambda ids, scores, more: scores]},
    "stopping_criteria: is function; pass a list": {"stopping_criteria": lambda ids, scores: False},
    "attention_mask: is list": {"attention_mask": [[1]]},
    "attention_mask: is (3,)": {"attention_mask": torch.ones(3)},
    "pixel_values: is list; call the processor": {"pixel_values": [[0.0]]},
    "pixel_values: is list; call": {"pixel_values": [torch.zeros(1, 3, 8, 8)]},
    "token_type_ids: is list; call": {"token_type_ids": [[0]]},
    "pruner='twig': needs a budget": {"pruner": "twig"},
    "generator=5: is no random generator": {"generator": 5, "do_sample": True},
    "memory: is dict": {"memory": {}},
    "max_length='30': must be a whole number": {"max_length": "30"},
    "max_length=30.0: must be a whole number": {"generation_config": GenerationConfig(max_length=30.0)},
    "num_return_sequences=2.0: must be a whole number": {"num_return_sequences": 2.0, "do_sample": True},
    "max_time='1': must be a number": {"max_time": "1"},
    "top_p='0.5': must be a number": {"top_p": "0.5", "do_sample": True},
    "stop_strings=5: must be a list of texts": {"stop_strings": 5, "tokenizer": PROCESSOR.tokenizer},
    "stop_strings=[5]: must be a list of texts": {"stop_strings": [5], "tokenizer": PROCESSOR.tokenizer},
    "tokenizer: is LlavaProcessor; pass tokenizer=processor.tokenizer": {"stop_strings": ["a"], "tokenizer": PROCESSOR},
    "streamer: is str; pass one of transformers": {"streamer": "text"},
    "prefix_allowed_tokens_fn: is list; pass a function": {"prefix_allowed_tokens_fn": [3]},
    "stopping_criteria: str is not callable": {"stopping_criteria": ["eos"]},
    "the base refuses this call (new(): invalid data type 'str'); check its arguments": {"eos_token_id": "a"},
    "the base refuses this call ('int' object is not iterable)": {"suppress_tokens": 5},
    "input_ids: holds torch.float32": {"input_ids": torch.ones(1, 3)},
    "input_ids: holds torch.bool": {"input_ids": torch.ones(1, 3, dtype=torch.bool)},
    "position_ids: is (1, 3); give one for each of the 25 tokens": {"position_ids": torch.arange(3)[None]},
    "attention_mask: holds negative numbers": {"attention_mask": -torch.ones(1, 25)},
    "bad_words_ids: has the token id 1000; give ids below 100": {"bad_words_ids": [[3, 1000]]},
    "sequence_bias: has the token id 100;": {"sequence_bias": {(100,): 1.0}},
    "forced_eos_token_id: has the token id 200;": {"forced_eos_token_id": [3, 200]},
    "forced_bos_token_id: has the token id 300;": {"forced_bos_token_id": 300},
}
"""Options of `generate` by what their message says."""


def calls(model):
    """All calls by what their message says."""
    found = {
        message: lambda options=options: model.generate(**{**prompt(), "max_new_tokens": 2, **options})
        for message, options in OF_GENERATE.items()
    }
    return {
        **found,
        "foo: no option of an engine": lambda: model.engine(foo=1),
        "max_rows='3': must be a whole number": lambda: model.engine(max_rows="3"),
        "max_bytes=-1: must be 1 or more": lambda: model.engine(max_bytes=-1),
        "inputs: is Tensor; pass the processor's outputs": lambda: model.engine().add(prompt()["input_ids"]),
        "memory: is dict; pass a PrefixCache": lambda: model.engine().add(prompt(), memory={}, max_new_tokens=2),
        "processor: is str; pass the base's processor": lambda: model.chat("llava-hf/llava-1.5-7b-hf"),
        "question: is int; ask a text": lambda: model.chat(PROCESSOR).ask(5),
        "input_ids: a conversation passes its own": lambda: model.chat(PROCESSOR, input_ids=torch.ones(1, 3)).ask("Hi"),
        "memory: a conversation passes its own": lambda: model.chat(PROCESSOR).ask("Hi", memory=None),
        "base: is NoneType; pass a loaded Hugging Face model": lambda: TwigVLM.grow(None),
        "base: is str; pass a loaded Hugging Face model": lambda: TwigVLM.grow("llava-hf/llava-1.5-7b-hf"),
        "base: has a twig already": lambda: TwigVLM.grow(model),
        "final_share='x': must be a number": lambda: TwigConfig(final_share="x"),
        "draft_threshold=None: must be a number": lambda: SpeculationConfig("chain", draft_threshold=None),
        "learning_rate='1e-4': must be a number": lambda: Stage1Config(learning_rate="1e-4"),  # as YAML reads it
        "alpha=None: must be a number": lambda: Stage1Config(alpha=None),
        "warmup='0': must be a number": lambda: Stage2Config(warmup="0"),
    }


def told(call):
    """The message of an error of this library; of any other one its kind."""
    try:
        call()
    except TwigVLMError as error:
        return str(error)
    except Exception as error:
        return repr(error)
    return "nothing"


if __name__ == "__main__":
    grown = TwigVLM.grow(tiny_llava(3), TwigConfig(2, 2))
    print(json.dumps({message: told(call) for message, call in calls(grown).items()}))
