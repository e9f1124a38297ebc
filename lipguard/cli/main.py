"""The `lipguard` command: bound, audit or verify a checkpoint, examine the installation, run the demonstration.

Exit codes: 0 done, 1 not certified, 2 bad input. Everything slow to import is imported inside its command.
"""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING

from lipguard.errors import (
    Contradiction,
    InvalidDomain,
    InvalidExample,
    LipguardError,
    NotCertified,
    SolverFailed,
    SolverUnavailable,
    UnsupportedQuery,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lipguard.certificate import Ball, Box, Certificate

DONE, NOT_CERTIFIED, BAD_INPUT = 0, 1, 2

_UNCERTIFIED = (NotCertified, SolverFailed, SolverUnavailable, Contradiction)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = _parser().parse_args(arguments)
    command = options.subcommand
    values = options[command]
    try:
        return {"audit": _audit, "bound": _bound, "demo": _demo, "doctor": _doctor, "verify": _verify}[command](values)
    except LipguardError as error:
        code = NOT_CERTIFIED if isinstance(error, _UNCERTIFIED) else BAD_INPUT
        kind, text = type(error).__name__, " ".join(str(error).split())
    except ModuleNotFoundError as error:
        code, kind, text = BAD_INPUT, type(error).__name__, str(error)
    print(f"{kind}: {text}", file=sys.stderr)  # noqa: T201 - the command's output
    if getattr(values, "json", False):
        _print_json({"error": {"kind": kind, "message": text}, "exit_code": code})
    return code


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from lipguard import __version__
    from lipguard.cli.audit import add_audit

    parser = ArgumentParser(prog="lipguard", description="Verified Lipschitz bounds of PyTorch networks.", version=__version__)
    commands = parser.add_subcommands(required=True)

    bound = ArgumentParser(description="Bound the Lipschitz constant of a checkpoint's network.")
    bound.add_argument("checkpoint", type=str, help="a Lightning checkpoint, a state_dict, or a whole module (with --trust)")
    bound.add_argument("--model", type=str | None, help="module.Class, or a factory, that builds the module")
    bound.add_argument(
        "--input-shape", type=str | None, help="shape with its batch dimension, such as 1,784; one number n means 1,n"
    )
    bound.add_argument("--method", type=str | None, help="lipsdp-neuron, -layer, -channel, spectral or sampling (a lower bound)")
    bound.add_argument("--solver", type=str, default="auto", help="solver that proposes the bound; see lipguard doctor")
    bound.add_argument("--norm", type=str, default="2", help="1, 2 or inf, or two of them: input,output")
    bound.add_argument(
        "--domain", type=str | None, help="box:LOWER,UPPER or ball:RADIUS (around 0, in the input norm); default: all inputs"
    )
    bound.add_argument("--submodule", type=str | None, help="dotted name of the submodule to bound")
    bound.add_argument("--time-limit", type=float | None, help="seconds")
    bound.add_argument("--json", action="store_true", help="print one JSON document")
    bound.add_argument("--trust", action="store_true", help="allow the file to run code while it is read (full pickle)")
    commands.add_subcommand("bound", bound, help="bound the Lipschitz constant of a checkpoint's network")

    add_audit(commands)

    doctor = ArgumentParser(description="List versions, solvers, licences and limits, and what a missing solver needs.")
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    commands.add_subcommand("doctor", doctor, help="list versions, solvers, licences and limits")

    demo = ArgumentParser(description="Train a classifier on scikit-learn's digits with LipschitzMonitor.")
    demo.add_argument("--epochs", type=int, default=30, help="epochs to train")
    demo.add_argument("--out", type=str, default="lipguard-demo", help="folder for the log, the checkpoint and the plot")
    commands.add_subcommand("demo", demo, help="train a small classifier with its bounds beside its accuracy")
    return parser


def _bound(options: Namespace) -> int:
    from lipguard.bounds import bound
    from lipguard.checkpoint import example_input, load_module

    norm = _norm(options.norm)
    module = load_module(options.checkpoint, model=options.model, trust=options.trust)
    certificate = bound(
        module,
        example_input(module, _shape(options.input_shape)),
        method=options.method,
        norm=norm,
        domain=_domain(options.domain, norm[0]),
        solver=options.solver,
        submodule=options.submodule,
        time_limit=options.time_limit,
    )
    document = _document(certificate, options)
    if options.json:
        _print_json(document)
    else:
        _print_certificate(certificate, options)
    return DONE if certificate.rigor == "verified" else NOT_CERTIFIED


def _audit(options: Namespace) -> int:
    from lipguard.cli.audit import audit

    norm = None if options.norm is None else _norm(options.norm)
    domain = _domain(options.domain, 2.0 if norm is None else norm[0])
    code, document = audit(options, norm, domain, _shape(options.input_shape))
    if options.json:
        _print_json(document)
    return code


def _verify(options: Namespace) -> int:
    from lipguard.cli.audit import verify

    code, document = verify(options)
    if options.json:
        _print_json(document)
    return code


def _doctor(options: Namespace) -> int:
    from lipguard.cli.doctor import examine, show

    report = examine()
    if options.json:
        _print_json(report)
    else:
        from lipguard.cli.text import Screen

        show(report, Screen())
    return DONE


def _demo(options: Namespace) -> int:
    from lipguard.cli.demo import run

    if options.epochs < 1:
        raise UnsupportedQuery(f"--epochs {options.epochs}: at least 1.")
    run(options.epochs, options.out)
    return DONE


def _numbers(text: str, option: str, error: type[LipguardError]) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise error(f"{option} {text}: expected numbers separated by commas.") from None


def _norm(text: str) -> tuple[float, float]:
    from lipguard.certificate import norm_pair

    values = _numbers(text, "--norm", UnsupportedQuery)
    return norm_pair(values[0] if len(values) == 1 else tuple(values))  # type: ignore[arg-type]


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    values = _numbers(text, "--input-shape", InvalidExample)
    if any(value != int(value) or value < 1 for value in values if math.isfinite(value)) or not all(map(math.isfinite, values)):
        raise InvalidExample(f"--input-shape {text}: expected whole numbers of at least 1, such as 1,784.")
    sizes = tuple(int(value) for value in values)
    return sizes if len(sizes) > 1 else (1, *sizes)


def _domain(text: str | None, norm: float) -> Box | Ball | None:
    from lipguard.certificate import Ball, Box

    if text is None:
        return None
    kind, _, rest = text.partition(":")
    values = _numbers(rest, "--domain", InvalidDomain)
    if kind == "box" and len(values) == 2:
        return Box(*values)
    if kind == "ball" and len(values) == 1:
        return Ball(0.0, values[0], norm)
    raise InvalidDomain(f"--domain {text}: expected box:LOWER,UPPER or ball:RADIUS.")


def _document(certificate: Certificate, options: Namespace) -> dict[str, object]:
    from lipguard import __version__

    return {
        "checkpoint": options.checkpoint,
        "model": options.model,
        "submodule": options.submodule,
        "value": certificate.value,
        "side": certificate.side,
        "rigor": certificate.rigor,
        "method": certificate.method,
        "solver": options.solver,
        "norm": [str(p) for p in certificate.norm],
        "domain": None if certificate.domain is None else certificate.domain.json(),
        "network": certificate.digest,
        "seconds": certificate.seconds,
        "note": certificate.note,
        "details": certificate.details,
        "lipguard": __version__,
    }


def _print_certificate(certificate: Certificate, options: Namespace) -> None:
    from lipguard.cli.text import Cell, Screen
    from lipguard.outward import show, show_upper

    norms = " → ".join({1.0: "l1", 2.0: "l2"}.get(p, "l∞") for p in certificate.norm)
    colour = "green" if certificate.rigor == "verified" else "yellow"
    value = show(certificate.value, certificate.side, 9)
    rows: list[tuple[str, Cell]] = [
        ("bound", (f"{value}  {certificate.side}, {certificate.rigor}", f"bold {colour}")),
        ("norms", norms),
        ("domain", options.domain or "all inputs"),
        ("method", certificate.method),
        ("network", certificate.digest[:16]),
        ("time", f"{show_upper(certificate.seconds, 3)} s"),
    ]
    rows += [("note", certificate.note)] if certificate.note else []
    Screen().table([((name, "dim"), cell) for name, cell in rows])


def _print_json(document: dict[str, object]) -> None:
    print(json.dumps(_finite(document), indent=2, allow_nan=False))  # noqa: T201 - the command's output


def _finite(value: object) -> object:
    """JSON has no inf and nan: they are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    sys.exit(main())
