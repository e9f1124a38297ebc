"""The `lipguard` command: bound, certify, audit or verify a checkpoint, examine the installation, run the demonstration.

Exit codes: 0 done, 1 not certified, 2 bad input. Everything slow to import is imported inside its command.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentError
from typing import TYPE_CHECKING

from lipguard.errors import (
    Contradiction,
    LipguardError,
    NotCertified,
    SolverFailed,
    SolverUnavailable,
    UnsupportedQuery,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lipguard.certificate import Certificate

DONE, NOT_CERTIFIED, BAD_INPUT = 0, 1, 2

_UNCERTIFIED = (NotCertified, SolverFailed, SolverUnavailable, Contradiction)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    from lipguard.cli.asking import typed_here

    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser().parse_args(given)
        return _COMMANDS[options.subcommand](options[options.subcommand])
    except LipguardError as error:
        code = NOT_CERTIFIED if isinstance(error, _UNCERTIFIED) else BAD_INPUT
        kind, text = type(error).__name__, typed_here(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        code, kind, text = BAD_INPUT, type(error).__name__, str(error)
    except ArgumentError as error:  # an option that there is not, or a value of another type
        code, kind, text = BAD_INPUT, "UnknownOption", " ".join(str(error).split())
    print(f"{kind}: {text}", file=sys.stderr)  # noqa: T201 - the command's output
    if "--json" in given:
        _print_json({"error": {"kind": kind, "message": text}, "exit_code": code})
    return code


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from lipguard import __version__
    from lipguard.cli.audit import add_audit
    from lipguard.cli.commands import add_commands

    parser = ArgumentParser(
        prog="lipguard",
        description="Verified Lipschitz bounds of PyTorch networks.",
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True)

    add_commands(commands)
    add_audit(commands)

    doctor = ArgumentParser(
        exit_on_error=False, description="List versions, solvers, licences and limits, and what a missing solver needs."
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    commands.add_subcommand("doctor", doctor, help="list versions, solvers, licences and limits")

    demo = ArgumentParser(exit_on_error=False, description="Train a classifier on scikit-learn's digits with LipschitzMonitor.")
    demo.add_argument("--epochs", type=int, default=30, help="epochs to train")
    demo.add_argument("--out", type=str, default="lipguard-demo", help="folder for the log, the checkpoint and the plot")
    commands.add_subcommand("demo", demo, help="train a small classifier with its bounds beside its accuracy")
    return parser


def _bound(options: Namespace) -> int:
    from lipguard.cli.commands import bounded

    certificate = bounded(options)
    document = _document(certificate, options)
    if options.json:
        _print_json(document)
    else:
        _print_certificate(certificate, options)
    return DONE if certificate.rigor == "verified" else NOT_CERTIFIED


def _exact(options: Namespace) -> int:
    from lipguard.cli.commands import enclosed

    return _told(*enclosed(options), options)


def _certify(options: Namespace) -> int:
    from lipguard.cli.commands import certified

    return _told(*certified(options), options)


def _told(code: int, document: dict[str, object], options: Namespace) -> int:
    """Print a document: as JSON, or a line for each field that is no list."""
    if options.json:
        _print_json(document)
    else:
        for name, value in document.items():
            if value not in (None, "", {}) and not isinstance(value, list):
                print(f"{name:>18}  {value}")  # noqa: T201 - the command's output
    return code


def _audit(options: Namespace) -> int:
    from lipguard.cli.audit import audit

    code, document = audit(options)
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


def _document(certificate: Certificate, options: Namespace) -> dict[str, object]:
    from lipguard import __version__

    return {
        "checkpoint": options.checkpoint,
        "model": options.model,
        "submodule": options.submodule,
        "outputs": options.outputs,
        "inputs": options.inputs,
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


_COMMANDS = {
    "audit": _audit,
    "bound": _bound,
    "certify": _certify,
    "demo": _demo,
    "doctor": _doctor,
    "exact": _exact,
    "verify": _verify,
}


if __name__ == "__main__":
    sys.exit(main())
