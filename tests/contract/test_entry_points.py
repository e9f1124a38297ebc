"""Entry points x options: what one entry point accepts, all accept and mean alike, or refuse with the reason.

Two tables, `OPTIONS` and `ENTRIES`, give every cell. A cell works where its value is that of the network captured by hand; the
cells of `REFUSED` have no meaning and are refused, where the entry point is called or constructed, with the reason stated there.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lipguard as lg
from lipguard.audit.options import Options
from lipguard.audit.pending import checkpoint_of, finish
from lipguard.audit.pool import Finished
from lipguard.audit.record import read_record, record_path
from lipguard.audit.run import audit_checkpoint
from lipguard.cli.main import main
from lipguard.errors import LipguardError

lightning = pytest.importorskip("lightning")

HERE = "tests.contract.test_entry_points"
X, C = torch.tensor([[0.5, -0.25, 1.0]]), torch.tensor([[1.0, -1.0]])


class Base(lightning.LightningModule):
    """Three inputs, two classes; trained without moving."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.net(x))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return sum(p.square().sum() for p in self.parameters())  # type: ignore[return-value]

    def validation_step(self, batch: Any, index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class Heads(Base):
    """Two results by name."""

    def forward(self, x: Tensor) -> Any:
        return {"value": self.net(x), "logits": self.head(self.net(x))}


class Context(Base):
    """Two input tensors, a state and a context."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Linear(2, 2)

    def forward(self, x: Tensor, c: Tensor) -> Any:
        return self.head(self.net(x) + self.context(c))


@dataclass
class Case:
    """One option: the module for which it matters, its value, and how it is typed."""

    kind: type[Base]
    example: Any
    given: dict[str, Any]
    typed: list[str]
    files: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Base:
        return self.kind().eval()

    def network(self) -> lg.Network:
        """The network, captured by hand."""
        parts = {name: value for name, value in self.given.items() if name in ("outputs", "inputs", "submodule")}
        return lg.capture(self.model(), self.example, **parts)

    @property
    def asked(self) -> dict[str, Any]:
        """Norm and domain."""
        return {name: value for name, value in self.given.items() if name in ("norm", "domain")}

    @property
    def fields(self) -> dict[str, Any]:
        """All but the example."""
        return {name: value for name, value in self.given.items() if name != "example"}


BOX = lg.Box([0.0, -1.0, 0.5], [1.0, 0.0, 1.5])
OPTIONS = {
    "outputs": Case(Heads, X, {"outputs": "logits"}, ["--outputs", "logits"]),
    "inputs": Case(Context, (X, C), {"inputs": "x"}, ["--inputs", "x"], {"--example": (X, C)}),
    "submodule": Case(Base, X, {"submodule": "net"}, ["--submodule", "net"]),
    "norm": Case(Base, X, {"norm": "inf"}, ["--norm", "inf"]),
    "domain": Case(Base, X, {"domain": BOX}, ["--domain", "box:[0,-1,0.5],[1,0,1.5]"]),
    "example": Case(Base, X, {"example": X}, [], {"--example": X}),
}


def upper(case: Case, method: str | None = "spectral") -> float:
    return lg.bound(case.network(), method=method, **case.asked).value


def close(value: float, expected: float) -> None:
    assert value == pytest.approx(expected, rel=1e-6)


def bound(case: Case, folder: Path) -> None:
    close(lg.bound(case.model(), case.example, method="spectral", **case.fields).value, upper(case))


def exact(case: Case, folder: Path) -> None:
    given = lg.exact(case.model(), case.example, time_limit=20, **case.fields)
    close(given.upper, lg.exact(case.network(), time_limit=20, **case.asked).upper)


def capture(case: Case, folder: Path) -> None:
    assert lg.capture(case.model(), case.example, **case.fields).digest == case.network().digest


def certify(case: Case, folder: Path) -> None:
    samples, labels = _data(case)
    found = lg.certify(case.model(), samples, labels, 0.01, method="spectral", **{"example": case.example, **case.fields})
    box = case.given.get("domain")
    by_hand = lg.certify(case.network(), samples, labels, 0.01, method="spectral", box=box)
    assert torch.equal(found.radius, by_hand.radius) and bool(found.radius.max() > 0)


def tracker(case: Case, folder: Path) -> None:
    close(lg.Tracker(case.model(), case.example, method="spectral", **case.fields).update()[0], upper(case))


def monitor(case: Case, folder: Path) -> None:
    watch = lg.LipschitzMonitor(method="spectral", on_failure="raise", **{"example": case.example, **case.fields})
    _fit(watch, case, folder)
    assert watch.last is not None
    close(watch.last.upper.value, upper(case))


def certified_accuracy(case: Case, folder: Path) -> None:
    samples, labels = _data(case)
    made = lg.CertifiedAccuracy(
        eps=0.01, method="spectral", select=lambda batch: (samples, labels), on_failure="raise",
        **{"example": case.example, **case.fields},
    )  # fmt: skip
    trainer = _fit(made, case, folder)
    by_hand = lg.certify(case.network(), samples, labels, 0.01, method="spectral", box=case.given.get("domain"))
    close(float(trainer.callback_metrics["lipschitz/certified_accuracy@0.01"]), by_hand.certified_accuracy)


def regularizer(case: Case, folder: Path) -> None:
    made = lg.LipschitzRegularizer("spectral", weight=0.1, on_failure="raise", **{"example": case.example, **case.fields})
    _fit(made, case, folder)
    assert made._penalty is not None and made._penalty.network().digest == case.network().digest


def projection(case: Case, folder: Path) -> None:
    made = lg.LipschitzProjection(0.01, **{"example": case.example, **case.fields})
    model = case.kind()
    _fit(made, case, folder, model)
    norm = float(case.given.get("norm", 2))
    inside = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in inside.items():
        projected = not case.given.get("submodule") or name.startswith("net")
        assert (float(torch.linalg.matrix_norm(layer.weight, norm)) <= 0.0101) == projected, name


def auditor(case: Case, folder: Path) -> None:
    made = lg.CheckpointAuditor(method="bounds", time_limit=20, **{"example": case.example, **case.fields})
    trainer = _fit(made, case, folder)
    trainer.save_checkpoint(folder / "a.ckpt")
    _recorded(folder / "a.ckpt", case)


def of_checkpoint(case: Case, folder: Path) -> None:
    path = _saved(case, folder)
    options = Options(method="bounds", time_limit=20)
    _recorded(path, case, audit_checkpoint(path, case.model(), case.example, options, **case.fields))


def cli_bound(case: Case, folder: Path) -> dict[str, Any]:
    return _run("bound", case, folder, "--method", "spectral", value=upper)


def cli_exact(case: Case, folder: Path) -> dict[str, Any]:
    return _run("exact", case, folder, value=lambda case: lg.exact(case.network(), **case.asked).upper)


def cli_certify(case: Case, folder: Path) -> dict[str, Any]:
    samples, labels = _data(case)
    torch.save({"samples": samples, "labels": labels}, folder / "data.pt")

    def by_hand(case: Case) -> float:
        box = case.given.get("domain")
        return lg.certify(case.network(), samples, labels, 0.01, method="spectral", box=box).certified_accuracy

    given = ("--data", str(folder / "data.pt"), "--eps", "0.01", "--method", "spectral")
    return _run("certify", case, folder, *given, value=by_hand, field="certified_accuracy", codes=(0, 1))


def cli_audit(case: Case, folder: Path) -> dict[str, Any]:
    found = _run("audit", case, folder, "--method", "bounds", "--time-limit", "20")
    _recorded(folder / "weights.ckpt", case)
    verified = _run("verify", case, folder)
    assert verified["records"][0]["state"] == "verified"
    return found


ENTRIES: dict[str, Callable[[Case, Path], Any]] = {
    "bound": bound,
    "exact": exact,
    "capture": capture,
    "certify": certify,
    "Tracker": tracker,
    "LipschitzMonitor": monitor,
    "CertifiedAccuracy": certified_accuracy,
    "LipschitzRegularizer": regularizer,
    "LipschitzProjection": projection,
    "CheckpointAuditor": auditor,
    "audit_checkpoint": of_checkpoint,
    "lipguard bound": cli_bound,
    "lipguard exact": cli_exact,
    "lipguard certify": cli_certify,
    "lipguard audit": cli_audit,
}
REFUSED = {
    ("capture", "norm"): "norm and domain belong to the bound",
    ("capture", "domain"): "norm and domain belong to the bound",
    ("certify", "norm"): "balls in the 2-norm",
    ("CertifiedAccuracy", "norm"): "balls in the 2-norm",
    ("lipguard certify", "norm"): "balls in the 2-norm",
    ("LipschitzRegularizer", "norm"): "the constant in the 2-norm",
    ("LipschitzRegularizer", "domain"): "is that of all inputs. Take penalty='lipsdp-local'",
    ("LipschitzProjection", "domain"): "that on all inputs. Leave domain out",
    ("LipschitzProjection", "outputs"): "whole layers are scaled",
    ("LipschitzProjection", "inputs"): "whole layers are scaled",
}


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits in this process: starting one for each cell would take seconds."""

    class Here:
        patience = 0.0

        def __init__(self, workers: int) -> None:
            self.done: list[Finished] = []

        @property
        def open(self) -> int:
            return len(self.done)

        def submit(self, marker: Path, time_limit: float, *, final: bool, twin: Path | None = None) -> None:
            result = finish(marker, final=final, twin=twin)
            self.done.append(Finished(checkpoint_of(marker), result, None, None))

        def wait(self, seconds: float) -> None:
            pass

        def collect(self) -> list[Finished]:
            done, self.done = self.done, []
            return done

        def close(self) -> None:
            pass

    monkeypatch.setattr("lipguard.callbacks.auditor.Pool", Here)
    monkeypatch.setattr("lipguard.audit.pool.Pool", Here)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_cell_works_or_is_refused_with_the_reason(
    entry: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = OPTIONS[option]
    reason = REFUSED.get((entry, option))
    if reason is None:
        ENTRIES[entry](case, tmp_path)
    elif entry.startswith("lipguard "):
        with pytest.raises(AssertionError):
            ENTRIES[entry](case, tmp_path)
        document = json.loads(capsys.readouterr().out)
        assert document["exit_code"] == 2 and reason in document["error"]["message"]
    else:
        with pytest.raises(LipguardError, match=reason):
            ENTRIES[entry](case, tmp_path)


@pytest.mark.parametrize("option", OPTIONS)
def test_early_stopping_leaves_what_is_bounded_to_the_monitor(option: str) -> None:
    with pytest.raises(LipguardError, match=f"LipschitzEarlyStopping: {option}=.*Give it to LipschitzMonitor"):
        lg.LipschitzEarlyStopping(1.0, **OPTIONS[option].given)


def _data(case: Case) -> tuple[Tensor, Tensor]:
    samples = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) + torch.tensor([0.0, -1.0, 0.5])
    return samples, case.network()(samples).argmax(1)


def _fit(callback: Any, case: Case, folder: Path, model: Base | None = None) -> Any:
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, callbacks=[callback], default_root_dir=folder,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(X.repeat(4, 1), torch.zeros(4, dtype=torch.long)), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(case.kind() if model is None else model, loader, loader)
    return trainer


def _saved(case: Case, folder: Path) -> Path:
    torch.save({"state_dict": case.model().state_dict()}, folder / "weights.ckpt")
    return folder / "weights.ckpt"


def _recorded(path: Path, case: Case, record: Any = None) -> None:
    record = record or read_record(record_path(path))
    assert record.failure is None and record.network["digest"] == case.network().digest
    close(record.upper, upper(case, None))
    for name in ("outputs", "inputs", "submodule"):
        assert record.query[name] == case.given.get(name)


def _run(
    command: str,
    case: Case,
    folder: Path,
    *given: str,
    value: Callable[[Case], float] | None = None,
    field: str | None = None,
    codes: tuple[int, ...] = (0,),
) -> dict[str, Any]:
    path = folder / "weights.ckpt"
    if not path.exists():
        _saved(case, folder)
    arguments = [command, str(path), "--model", f"{HERE}.{case.kind.__name__}", "--json", *case.typed, *given]
    for option, content in case.files.items():
        torch.save(content, folder / "example.pt")
        arguments += [option, str(folder / "example.pt")]
    if not case.files:
        arguments += ["--input-shape", "1,3"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(arguments)
    print(out.getvalue())
    assert code in codes, out.getvalue()
    document = json.loads(out.getvalue())
    if value is not None:
        close(document[field or ("value" if "value" in document else "upper")], value(case))
    return document
