"""Builds the draft policy that a configuration names, and checks that base and twig can draft so."""

from twigvlm.base.masks import check_mask_attention
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.errors import TwigVLMError
from twigvlm.speculation.adaptive_tree import AdaptiveTree
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.lookup import Lookup
from twigvlm.speculation.policies import Chain, DraftPolicy, EarlyExit, FixedTree
from twigvlm.twig.block import Twig


def make_policy(speculation: SpeculationConfig, costs: StepCosts | None, static: bool) -> DraftPolicy:
    """The policy that a configuration names.

    Args:
        speculation: the configuration.
        costs: costs of this machine, which `auto` needs.
        static: whether the shapes of passes do not depend on what was drafted, which saves reads from the device.
    """
    if speculation.speculate == "auto":
        assert costs is not None, "auto weighs drafts by them"
        return AdaptiveTree(costs, speculation.tree_width, static)
    if not speculation.active:
        return DraftPolicy()
    policies = {"chain": Chain, "tree": FixedTree, "lookup": Lookup, "exit": EarlyExit}
    return policies[speculation.speculate](speculation, static)


def check_speculation(speculation: SpeculationConfig, base: BaseVLM, twig: Twig, rows: int) -> None:
    """Raise TwigVLMError where a base and a twig cannot draft so.

    Args:
        speculation: how to draft.
        base: whose attention must take the masks of drafts and batches.
        twig: drafts.
        rows: that decode together.
    """
    if speculation.speculate == "exit" and not twig.config.trunk_layers:
        raise TwigVLMError(
            "speculate='exit': the twig has no trunk, whose layers would draft; use one with a trunk, or "
            "TwigVLM.without_twig(base, trunk_layers=8)"
        )
    if speculation.speculate in ("chain", "tree", "auto") and twig.is_stand_in:
        raise TwigVLMError(
            f"speculate={speculation.speculate!r}: this model has no twig that could draft; use 'lookup', or load "
            "a twig with TwigVLM.from_pretrained"
        )
    if speculation.speculate in ("tree", "auto"):
        check_mask_attention(base.attention, f"speculate={speculation.speculate!r}")
    if rows > 1:
        check_mask_attention(base.attention, f"batch of {rows} prompts")
