"""Drafting by the base's first layers alone: its own norm and head on the states after layer K (early exit)."""

from twigvlm.speculation.policies import Chain


class EarlyExit(Chain):
    """Chains as a twig of no layers would draft them: nothing is trained, and only the trunk runs."""

    uses_twig = False
