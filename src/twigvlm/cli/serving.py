"""What `serve` and `batch` share: options, and a service made from them."""

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
    """A model that answers requests, and what a request gets that does not say."""

    speculate: Annotated[Speculate, tyro.conf.arg(help_behavior_hint="(default: chain)")] = "chain"
    name: str | None = None
    """What requests call the model. None: the name of the base."""
    allow_image_host: tuple[str, ...] = ()
    """Hosts, by name, from which images may be fetched by https. None: nothing is fetched; images are data URIs."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    limits: Limits = field(default_factory=Limits)

    def open_service(self, limits: Limits | None = None) -> Service:
        """Load the model, and start its worker.

        Args:
            limits: None: those of the options.
        """
        check_installed()
        from twigvlm.cli.session import SessionConfig, open_session
        from twigvlm.serving.fetch import Fetcher
        from twigvlm.serving.service import Defaults, Service

        config = SessionConfig.resolve(self.model, self.twig or own_twig(self.model), self.pruning, self.speculate)
        if config.twig is None:
            raise TwigVLMError(f"model {self.model!r}: has no twig of its own; name one with --twig")
        session = open_session(config, self.dtype, self.device)
        assert session.model is not None, "it has a twig"
        defaults = Defaults(self.pruning, self.speculate)
        fetcher = Fetcher(self.allow_image_host, self.limits.max_body)
        return Service(
            session.model, session.processor, self.name or self.model, defaults, limits or self.limits, fetcher
        )


def own_twig(model: str) -> str | None:
    """The twig that comes with a base: Sapling's."""
    from twigvlm.loading import SAPLING

    if model != SAPLING:
        return None
    from twigvlm import sapling

    return str(sapling.twig_path())


def check_installed() -> None:
    """Raise TwigVLMError unless the packages of the server are there."""
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise TwigVLMError("serving needs more packages; install them by: pip install 'twigvlm[serve]'")
