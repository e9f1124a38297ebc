"""LipschitzProjection: every layer's norm is kept below a limit by scaling its weight after each optimizer step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lipguard.callbacks.asked import Asked, number, refuse
from lipguard.callbacks.base import Callback
from lipguard.callbacks.checkpoint_saves import bypassed
from lipguard.errors import UnknownName, UnsupportedQuery
from lipguard.penalties.projection import Layer, layers_of
from lipguard.query import Norm

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["LipschitzProjection"]


class LipschitzProjection(Callback):
    """After every optimizer step: W <- W / max(1, ||W||_p / max_norm) for every layer.

    Layers are linear layers, convolutions and transposed convolutions (by the norm of the map with its padding and strides on
    the input that arrives, not that of the flattened kernel), BatchNorm (by its running statistics), and any other module
    that computes one affine map with one weight. A chain of L such layers with 1-Lipschitz activations has then a
    Lipschitz constant of at most max_norm^L. Biases stay as they are.

    In the 2-norm the norm after a step comes from a subspace iteration that is carried on, and may fall short by about 1e-4; at
    the end of every epoch, and of the training, it is computed in full (up to 4 million entries of a layer's matrix). Under
    gradient accumulation nothing happens between the optimizer's real steps.

    Args:
        max_norm: limit of every layer's norm, > 0.
        norm: 1, 2 or inf.
        submodule: dotted name of the part whose layers are projected; None for all.
        layers: dotted names of the layers to project; None for all.
        example: an input of the module, or of the submodule; None takes its `example_input_array`, or else the first training
            batch. A tuple or a mapping of tensors, where it takes several.
        domain, outputs, inputs: refused: a layer's norm is that on all inputs, and whole layers are scaled.

    Raises:
        LipguardError: an argument that no module could make valid; the message says which, and what to write.
        UnsupportedLayer: at the start of the training, for a layer whose norm or weight is not known, with its name.

    Source: Gouk, Frank, Pfahringer, Cree 2021, arXiv:1804.04368.
    """

    def __init__(
        self,
        max_norm: float,
        norm: Norm = 2,
        submodule: str | None = None,
        layers: Sequence[str] | None = None,
        example: Any = None,
        domain: object = None,
        outputs: object = None,
        inputs: object = None,
    ) -> None:
        super().__init__()
        who = "LipschitzProjection"
        number(who, "a finite number > 0", lambda value: value > 0, max_norm=max_norm)
        refuse(who, "the norm of a layer is that on all inputs. Leave domain out.", domain=domain)
        whole = "whole layers are scaled, every one that runs. Choose them with submodule=... or layers=[...]."
        refuse(who, whole, outputs=outputs, inputs=inputs)
        self.asked = Asked(who, norm=norm, submodule=submodule, example=example)
        pair = self.asked.query.norm
        if pair[0] != pair[1]:
            raise UnsupportedQuery(f"LipschitzProjection: norm={norm!r} must be one norm, 1, 2 or inf.")
        self.max_norm, self.norm = max_norm, pair[0]
        self.submodule, self.layers = submodule, layers
        self.projected: list[Layer] = []
        self._module: LightningModule | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that shard the network.

        Raises:
            UnsupportedQuery: a rank holds a part of the weights only.
        """
        sharding = bypassed(trainer)
        if stage == "fit" and sharding is not None:
            raise UnsupportedQuery(f"LipschitzProjection: {sharding} shards the network, so that no rank can project it.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a submodule that the module does not have.

        Raises:
            UnknownName: there is no such submodule.
        """
        self.asked.check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the layers, if an example is at hand, and projects the first weights."""
        self._step = trainer.global_step
        self.projected, self._module = [], None
        self.asked.forget()
        if self.asked.find(trainer, pl_module) is not None:
            self._find(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Finds the layers by the first batch where no other example was at hand."""
        if self._module is None:
            self.asked.see(pl_module, batch)
            self._find(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Projects after a real optimizer step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.project(exact=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Projects by the norms in full."""
        self.project(exact=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Projects by the norms in full: a training may end within an epoch."""
        self.project(exact=True)

    def project(self, exact: bool = True) -> None:
        """Scale down every layer above the limit.

        Args:
            exact: by the norm in full instead of an iteration carried on.
        """
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.projected:
                norm = layer.norm(self.norm, exact)
                if math.isfinite(norm) and norm > self.max_norm:
                    layer.scale(self.max_norm / norm)

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        example = self.asked.at(trainer, pl_module).example
        self._module = pl_module
        found, fixed = layers_of(pl_module, example, self.submodule)
        if self.layers is not None:
            known = {layer.name for layer in found}
            unknown = [name for name in self.layers if name not in known]
            if unknown:
                raise UnknownName(f"LipschitzProjection: there is no layer {unknown[0]!r}; there are {', '.join(sorted(known))}.")
            found = [layer for layer in found if layer.name in self.layers]
        if not found:
            raise UnsupportedQuery("LipschitzProjection: there is no layer to project.")
        if fixed:
            warnings.warn(
                f"LipschitzProjection: {', '.join(fixed)} have no weight to scale (affine=False) and stay as they are.",
                stacklevel=2,
            )
        self.projected = found
        self.project(exact=True)
