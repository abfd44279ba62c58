"""What prunes, as the options of a call ask for it."""

from twigvlm.config import PruningConfig
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Pruner
from twigvlm.pruning.methods import pruner_by_name
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.methods.scout import ScoutPruner
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.select import best, best_of_each_image, diverse
from twigvlm.pruning.view import Scorer
from twigvlm.twig.block import Twig


def build_pruner(
    options: PruningConfig, twig: Twig, layers: int, scorer: Scorer | None = None, pruner: Pruner | str | None = None
) -> Pruner | None:
    """The pruning method that the options of a call ask for; None if they prune nothing.

    Args:
        options: the call's options.
        twig: the model's twig.
        layers: L of the base.
        scorer: ranks the visual tokens; None: the twig's own ranking.
        pruner: another method, as an object or by name; None or "twig": the twig's own.

    Raises:
        TwigVLMError: the options do not go together, there is no such method, or no trained twig to rank the tokens.
    """
    pruner = pruner_by_name(pruner)
    if scorer is not None and not callable(scorer):
        raise TwigVLMError(f"scorer={scorer!r}: cannot be called; give another method than the twig's by pruner")
    if scorer is not None and not options.active:
        raise TwigVLMError("scorer: needs a budget; give retain or keep too")
    if pruner is not None:
        options.check_beside_pruner(scorer)
        return pruner
    if not options.active:
        return None
    if scorer is None and twig.is_stand_in:
        raise TwigVLMError(
            "pruning: this model has no trained twig to rank visual tokens; name another method with pruner, for example "
            "'divprune', or load a twig with TwigVLM.from_pretrained"
        )
    ranking = scorer or default_scorer(twig)
    select = diverse if options.diverse else best_of_each_image if options.retain_per_image else best
    if options.scout:
        return ScoutPruner(twig, ranking, options.keep, select)
    trunk, final_wipe, final_share = twig.config.cut_layers(layers, options.final_wipe, options.final_share)
    if options.final_share and final_wipe == layers:
        raise TwigVLMError(
            f"final_share={options.final_share:g}: needs a layer after which tokens leave; give final_wipe, less than "
            f"{layers}, too"
        )
    return TwigPruner(ranking, trunk, final_wipe, final_share, options.keep, select)
