"""What transformers' own tools, and people who know them, ask of a model."""

from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn

from twigvlm.base.vlm import BaseVLM
from twigvlm.checkpoints import twig_files
from twigvlm.checkpoints.hub import push
from twigvlm.twig.block import Twig


class HFInterface(nn.Module):
    """Methods and attributes by which a Hugging Face model is saved and inspected; they save the twig and describe the base."""

    model: Any
    base: BaseVLM
    twig: Twig

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Save only the twig to a directory, with a model card. Each file is replaced completely or not at all.

        Args:
            path: path of the directory, which is created if it does not exist.

        Raises:
            TwigVLMError: the model has no twig, its training has diverged, or the directory cannot be written to.
        """
        twig_files.save(self.base, self.twig, path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload twig",
    ) -> str:
        """Save the twig to a hub repository, which is created if it does not exist, and return its URL.

        A model card there that is not ours stays.

        Args:
            repo_id: `user/name`.
            private: whether a new repository is private; None: the default of your account.
            token: with write access; None: the token of your login.
            commit_message: message of the upload.

        Raises:
            TwigVLMError: the hub refuses or cannot be reached.
        """
        with TemporaryDirectory() as folder:
            twig_files.save(self.base, self.twig, folder, name=repo_id)
            card, record = twig_files.CARD, twig_files.RECORD
            return push(Path(folder), repo_id, private, token, commit_message, card, [record])

    @property
    def config(self) -> Any:
        """The base's config, as transformers' own tools expect it; the twig's is `twig.config`."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The base's generation config: the defaults of `generate`."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    @property
    def device(self) -> torch.device:
        """Device that inputs must be on."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's data type."""
        return cast(torch.dtype, self.model.dtype)

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Where accelerate put the base's modules.

        Raises:
            AttributeError: the base was not loaded with a `device_map`.
        """
        return cast(dict[str, Any], self.model.hf_device_map)

    @property
    def input_modalities(self) -> Any:
        """What the base accepts, for example image and text."""
        return self.model.input_modalities

    @property
    def output_modalities(self) -> Any:
        """What the base produces: text."""
        return self.model.output_modalities

    def can_generate(self) -> bool:
        """Always True, as `transformers.pipeline` requires."""
        return True

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters of base and twig together.

        Args:
            only_trainable: count only parameters that are trained.
            exclude_embeddings: leave the base's embeddings out.
        """
        twig = sum(weight.numel() for weight in self.twig.parameters() if weight.requires_grad or not only_trainable)
        return int(self.model.num_parameters(only_trainable, exclude_embeddings)) + twig

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters in one line, as PEFT does."""
        trainable, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
