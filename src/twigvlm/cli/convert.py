"""`twigvlm convert`: import a published twig."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from twigvlm.cli.options import Dtype


@dataclass(frozen=True)
class Convert:
    """Convert a twig that the method's authors published into this library's format."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Directory with the published weights."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory for the twig."""
    model: str
    """The base it was trained on: a Hugging Face id or a directory."""
    # One value today; named so that others can be added.
    layout: Annotated[Literal["milvlg"], tyro.conf.arg(name="from")] = "milvlg"
    """Layout of the published weights."""
    trunk_layers: int = 2
    """K: base layers below the twig."""
    final_wipe: int | None = None
    """K_f that pruning with this twig will use by default. None: no FinalWipe."""
    dtype: Dtype = "auto"
    """Data type of the base and of the twig that is written. auto: as stored in the base's files."""

    def run(self) -> None:
        """Convert, and write the twig to `out`."""
        from twigvlm.checkpoints.milvlg import import_milvlg
        from twigvlm.cli.output import busy
        from twigvlm.cli.session import load_base
        from twigvlm.errors import TwigVLMError

        if not self.source.is_dir():
            raise TwigVLMError(f"source {str(self.source)!r}: no such directory; name that of a published twig")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise TwigVLMError(f"out {str(self.out)!r}: already exists; choose another directory")
        with busy(f"Loading {self.model}"):
            base, _ = load_base(self.model, self.dtype, "cpu")
        with busy(f"Converting {self.source}"):
            import_milvlg(base, self.source, self.trunk_layers, self.final_wipe).save_pretrained(self.out)
        print(f"Twig: {self.out}")
