"""Batches of every form: the example is what `forward` takes, not what stands first."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

import lipguard as lg

X = torch.zeros(1, 8)


class Base(pl.LightningModule):
    """8 inputs, 3 classes; batches {weight, x, y}."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def logits(self, batch: Any) -> Tensor:
        return self(batch["x"])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch["y"] if isinstance(batch, dict) else batch[-1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.logits(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class ByPart(Base):
    """The step calls a part, and never the module itself."""

    def logits(self, batch: Any) -> Tensor:
        return self.net(batch["x"])


class OtherName(ByPart):
    """The argument has another name than the key."""

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features)


class OfMapping(Base):
    """forward takes the batch."""

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch["x"])

    def logits(self, batch: Any) -> Tensor:
        return self(batch)


class OfMappingByPart(OfMapping):
    def logits(self, batch: Any) -> Tensor:
        return self.net(batch["x"])


class Second(Base):
    """A tuple whose input stands second."""

    def logits(self, batch: Any) -> Tensor:
        return self(batch[1])


class SecondByPart(Second):
    def logits(self, batch: Any) -> Tensor:
        return self.net(batch[1])


class WithContext(Base):
    """A second input, given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Linear(2, 3)

    def forward(self, x: Tensor, *, context: Tensor) -> Tensor:
        return self.net(x) + self.context(context)

    def logits(self, batch: Any) -> Tensor:
        return self(batch["x"], context=batch["context"])


class WithContextByPart(WithContext):
    def logits(self, batch: Any) -> Tensor:
        return self.net(batch["x"]) + self.context(batch["context"])


def row(i: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(i)
    return {"weight": torch.tensor(1.0), "x": torch.randn(8, generator=g), "context": torch.ones(2), "y": i % 3}


def two_alike(i: int) -> dict[str, Any]:
    return {"before": torch.zeros(8), "x": torch.ones(8), "y": i % 3}


def in_order(i: int) -> tuple[Any, ...]:
    return torch.tensor(1.0), row(i)["x"], i % 3


def fit(module: pl.LightningModule, callback: Any, make: Callable[[int], Any] = row, **options: Any) -> list[str]:
    """What is warned of."""
    loader = DataLoader([make(i) for i in range(16)], batch_size=8)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[callback], enable_checkpointing=False, num_sanity_val_steps=0, **quiet, **options
        )
        trainer.fit(module, loader, loader)
    return [str(one.message) for one in caught if "ipschitz" in str(one.message)]


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (Base, row), (ByPart, row), (OtherName, row), (OfMapping, row), (OfMappingByPart, row), (Second, in_order),
        (SecondByPart, in_order),
    ],
)  # fmt: skip
def test_the_input_is_found(kind: type[Base], make: Callable[[int], Any]) -> None:
    module, monitor = kind(), lg.LipschitzMonitor()
    assert fit(module, monitor, make) == []
    assert monitor.last is not None
    example: Any = X
    if isinstance(module, OfMapping):  # with respect to all tensors of the mapping
        example = {name: value[None] if isinstance(value, Tensor) else torch.tensor([value]) for name, value in row(0).items()}
    assert monitor.last.upper.digest == lg.capture(module, example).digest


@pytest.mark.parametrize("kind", [WithContext, WithContextByPart])
@pytest.mark.parametrize("inputs", [None, "x", "context", ("context", "x"), "x,context"])
def test_several_inputs_are_joint_or_chosen(kind: type[WithContext], inputs: Any) -> None:
    module, monitor = kind(), lg.LipschitzMonitor(inputs=inputs)
    assert fit(module, monitor) == []
    assert monitor.last is not None
    example = {"x": row(0)["x"][None], "context": torch.ones(1, 2)}
    assert monitor.last.upper.digest == lg.capture(module, example, inputs=inputs).digest


def test_one_of_two_tensors_that_both_fit_is_named() -> None:
    for kind in (ByPart, OtherName):
        module = kind()
        warned = fit(module, lg.LipschitzMonitor(), two_alike)
        if kind is ByPart:  # the argument is called x
            assert warned == []
            continue
        assert len(warned) == 1 and "'before'" in warned[0] and "LipschitzMonitor(inputs='before')" in warned[0]
        monitor = lg.LipschitzMonitor(inputs="x")
        assert fit(module, monitor, two_alike) == []
        assert monitor.last is not None and monitor.last.upper.digest == lg.capture(module.net, X).digest


def test_the_call_in_training_settles_it() -> None:
    class Calls(OtherName):
        def logits(self, batch: Any) -> Tensor:
            return self(batch["x"])

    monitor = lg.LipschitzMonitor()
    assert fit(Calls(), monitor, two_alike) == [] and monitor.last is not None


def test_a_mapping_without_an_input_names_its_keys() -> None:
    def make(i: int) -> dict[str, Any]:
        return {"points": torch.zeros(5), "y": i % 3}

    class Elsewhere(OtherName):
        def logits(self, batch: Any) -> Tensor:
            return self.net(batch["points"].repeat(1, 2)[:, :8])

    warned = fit(Elsewhere(), lg.LipschitzMonitor(), make)
    assert len(warned) == 1 and "takes none of the batch's tensors ('points': float32(1, 5)" in warned[0]
    assert "LipschitzMonitor(example=...)" in warned[0]


def test_nothing_is_left_on_the_module() -> None:
    for kind in (Base, ByPart):
        module = kind()
        fit(module, lg.LipschitzMonitor())
        assert not module._forward_pre_hooks


def test_the_other_callbacks(tmp_path: Any) -> None:
    module, projection = ByPart(), lg.LipschitzProjection(1.0)
    fit(module, projection)
    assert {layer.name for layer in projection.projected} == {"net.0", "net.2"}
    regularizer = lg.LipschitzRegularizer("spectral", weight=0.1)
    assert fit(ByPart(), regularizer) == []
    needs_inputs = lg.LipschitzRegularizer("local", weight=0.1, options={"radius": 0.1})
    assert fit(ByPart(), needs_inputs) == []
    accuracy, module = lg.CertifiedAccuracy(eps=1e-4), Base()
    assert fit(module, accuracy) == []
    assert 0 <= float(module.trainer.callback_metrics["lipschitz/certified_accuracy@0.0001"]) <= 1
