"""Options that `serve` and `batch` share, and the service that is made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import tyro

from twigvlm.cli.options import ModelOptions
from twigvlm.config import PruningConfig, Speculate
from twigvlm.errors import TwigVLMError
from twigvlm.serving.limits import Limits

if TYPE_CHECKING:
    from twigvlm.serving.service import Service


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(ModelOptions):
    """A model that answers requests, and the defaults of a request."""

    speculate: Annotated[
        Speculate | None, tyro.conf.arg(help_behavior_hint="(default: chain where there is a twig, otherwise none)")
    ] = None
    name: str | None = None
    """Name of the model in requests. None: the name of the base."""
    allow_image_host: tuple[str, ...] = ()
    """Names of hosts from which images may be fetched over https. None: nothing is fetched; images are data URIs."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    limits: Limits = field(default_factory=Limits)

    def open_service(self, limits: Limits | None = None) -> Service:
        """Load the model, and start its worker.

        Args:
            limits: limits of requests; None: those of the options.
        """
        check_installed()
        from twigvlm.serving.aside import load_aside

        return load_aside(lambda: self._open_service(limits or self.limits))

    def _open_service(self, limits: Limits) -> Service:
        from twigvlm.base.vision import VisionModules
        from twigvlm.cli.session import SessionConfig, open_session
        from twigvlm.loading import default_twig
        from twigvlm.model import TwigVLM
        from twigvlm.pruning.methods import pruner_by_name
        from twigvlm.pruning.methods.fitprune import FitPrune
        from twigvlm.pruning.methods.visionzip import VisionZip
        from twigvlm.pruning.projector import tuned_projector
        from twigvlm.serving.fetch import Fetcher
        from twigvlm.serving.fit import check_possible
        from twigvlm.serving.service import Defaults, Service

        twig = self.twig or default_twig(self.model)
        speculate = self.speculate or ("none" if twig is None else "chain")
        # A twig that has nothing to do by default still serves requests that ask for it.
        idle = twig is not None and speculate == "none" and not self.pruning.active
        config = SessionConfig.resolve(self.model, twig, self.pruning, "chain" if idle else speculate)
        session = open_session(config, self.dtype, self.device)
        model = session.model or TwigVLM.without_twig(session.base)
        pruner = pruner_by_name(self.pruning.pruner)
        # A wrong directory is refused here, not at the first request.
        if isinstance(pruner, VisionZip) and isinstance(pruner.projector, str):
            tuned_projector(pruner.projector, VisionModules.of(model.model, model.base.family.tower).projector)
        if isinstance(pruner, FitPrune):
            pruner.check(model.base.num_layers)
        check_possible(self.pruning, model.base, model.twig.config)
        defaults = Defaults(self.pruning, speculate)
        fetcher = Fetcher(self.allow_image_host, self.limits.max_body)
        return Service(model, session.processor, self.name or self.model, defaults, limits, fetcher)


def check_installed() -> None:
    """Raise TwigVLMError unless the packages of the server are installed."""
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise TwigVLMError("serving needs more packages; run: pip install 'twigvlm[serve]'")
