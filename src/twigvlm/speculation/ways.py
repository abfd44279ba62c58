"""Ways to draft by their names."""

from twigvlm.config import SpeculationConfig
from twigvlm.speculation.adaptive_tree import AdaptiveTree
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.early_exit import EarlyExit
from twigvlm.speculation.lookup import Lookup
from twigvlm.speculation.policies import Chain, FixedTree, NoDraft, Policy


def make_policy(speculation: SpeculationConfig, costs: StepCosts | None, exact: bool) -> Policy:
    """The policy that a configuration names.

    Args:
        speculation: the configuration.
        costs: of this machine, which `auto` needs.
        exact: whether passes are as long as the drafts, at the price of reads from the device.
    """
    if costs is not None:
        return AdaptiveTree(costs, speculation.tree_width)
    if not speculation.active:
        return NoDraft()
    policies = {"chain": Chain, "tree": FixedTree, "lookup": Lookup, "exit": EarlyExit}
    return policies[speculation.speculate](speculation, exact)


def policy_of_prefill(policy: Policy, speculation: SpeculationConfig, exact: bool) -> Policy:
    """The policy of the drafts behind a prompt: of trees chains, which are no deeper.

    A tree behind a prompt would need a mask over the prompt.
    """
    if policy.linear:
        return policy
    length = speculation.draft_length
    if speculation.speculate == "tree":
        length = min(speculation.tree_depth, speculation.tree_nodes)
    return Chain(SpeculationConfig("chain", draft_length=length), exact)
