"""Ways to draft by their names."""

from twigvlm.config import SpeculationConfig
from twigvlm.speculation.adaptive_tree import AdaptiveTree
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.lookup import Lookup
from twigvlm.speculation.policies import Chain, DraftPolicy, EarlyExit, FixedTree


def make_policy(speculation: SpeculationConfig, costs: StepCosts | None, exact: bool) -> DraftPolicy:
    """The policy that a configuration names.

    Args:
        speculation: the configuration.
        costs: of this machine, which `auto` needs.
        exact: whether passes are as long as the drafts, at the price of reads from the device.
    """
    if speculation.speculate == "auto":
        assert costs is not None, "auto weighs drafts by them"
        return AdaptiveTree(costs, speculation.tree_width, exact)
    if not speculation.active:
        return DraftPolicy()
    policies = {"chain": Chain, "tree": FixedTree, "lookup": Lookup, "exit": EarlyExit}
    return policies[speculation.speculate](speculation, exact)
