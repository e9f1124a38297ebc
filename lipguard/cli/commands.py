"""The commands `lipguard bound`, `exact` and `certify`: what is asked of one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipguard.cli.asking import add_query, asked, example_of, module_of, query_of
from lipguard.errors import InvalidExample

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from torch import Tensor

    from lipguard.certificate import Certificate

__all__ = ["add_commands", "bounded", "certified", "enclosed"]

DONE, NOT_CERTIFIED = 0, 1

Answer = tuple[int, dict[str, object]]
"""Exit code, and the JSON document."""


def add_commands(commands: Any) -> None:
    """Add the three commands to the parser's subcommands."""
    bound = _parser("Bound the Lipschitz constant of a checkpoint's network.")
    bound.add_argument("--method", type=str | None, help="lipsdp-neuron, -layer, -channel, spectral or sampling (a lower bound)")
    bound.add_argument("--solver", type=str, default="auto", help="solver that proposes the bound; see lipguard doctor")
    bound.add_argument("--time-limit", type=float | None, help="seconds")
    commands.add_subcommand("bound", bound, help="bound the Lipschitz constant of a checkpoint's network")

    exact = _parser("Enclose the Lipschitz constant of a checkpoint's piecewise-linear network, exactly where the time suffices.")
    exact.add_argument("--method", type=str, default="auto", help="enumeration, miqcqp, milp, branch-and-bound or auto")
    exact.add_argument("--solver", type=str, default="auto", help="of the mixed-integer methods; see lipguard doctor")
    exact.add_argument("--time-limit", type=float | None, default=60.0, help="seconds")
    exact.add_argument("--gap", type=float, default=1e-6, help="relative gap at which to stop")
    commands.add_subcommand("exact", exact, help="enclose the Lipschitz constant of a checkpoint's network")

    certify = _parser("Prove the 2-norm radius around samples in which their class stays. Exit code 0 where all are certified.")
    certify.add_argument(
        "--data", type=str | None, help="file of torch.save: {samples: (B, ...), labels: (B,)}, or both as a tuple"
    )
    certify.add_argument("--eps", type=float, help="radius, in the units of the input")
    certify.add_argument("--method", type=str, default="local", help="local, global or spectral")
    certify.add_argument("--time-limit", type=float | None, help="seconds")
    commands.add_subcommand("certify", certify, help="prove the classes of samples on balls around them")


def bounded(options: Namespace) -> Certificate:
    """The bound that is asked for."""
    from lipguard.bounds import bound

    module = module_of(options, options.checkpoint)
    query = query_of(options, module)
    return bound(
        module,
        query.example,
        method=options.method,
        norm=query.norm,
        domain=query.domain,
        outputs=query.outputs,
        inputs=query.inputs,
        submodule=query.submodule,
        solver=options.solver,
        time_limit=options.time_limit,
    )


def enclosed(options: Namespace) -> Answer:
    """The enclosure that is asked for; exit code 0 if both ends are verified."""
    from lipguard.exact import exact

    module = module_of(options, options.checkpoint)
    query = query_of(options, module)
    found = exact(
        module,
        query.example,
        domain=query.domain,
        norm=query.norm,
        method=options.method,
        solver=options.solver,
        time_limit=options.time_limit,
        gap=options.gap,
        outputs=query.outputs,
        inputs=query.inputs,
        submodule=query.submodule,
    )
    rigor = found.upper_certificate.rigor
    document: dict[str, object] = {"checkpoint": options.checkpoint, "model": options.model} | query.json()
    document |= {"lower": found.lower, "upper": found.upper, "gap": found.gap, "rigor": rigor, "status": found.status}
    document |= {"method": found.method, "network": found.lower_certificate.digest, "seconds": found.seconds}
    return DONE if rigor == "verified" else NOT_CERTIFIED, document | {"note": found.choice}


def certified(options: Namespace) -> Answer:
    """The radii that are asked for; exit code 0 if every sample is certified."""
    from lipguard.bounds.robustness import certify
    from lipguard.query import Query

    if options.data is None or options.eps is None:
        missing = "--data FILE" if options.data is None else "--eps 0.1"
        raise InvalidExample(f"certify needs samples with their labels and a radius: {missing} is missing.")
    module = module_of(options, options.checkpoint)
    samples, labels = _data(options.data)
    given = options.example is not None or options.input_shape is not None
    example = example_of(options, module) if given or options.inputs is not None else samples[:1]
    query = Query(**asked(options), example=example)
    found = certify(
        module,
        samples,
        labels,
        options.eps,
        method=options.method,
        norm=query.norm,
        domain=query.domain,
        outputs=query.outputs,
        inputs=query.inputs,
        submodule=query.submodule,
        example=query.example,
        time_limit=options.time_limit,
    )
    document = {"checkpoint": options.checkpoint, "model": options.model} | query.json()
    document |= {"eps": found.eps, "method": found.method, "samples": len(labels), "accuracy": found.accuracy}
    document |= {"certified_accuracy": found.certified_accuracy, "seconds": found.seconds}
    document |= {name: getattr(found, name).tolist() for name in ("predicted", "certified", "complete", "radius", "margin")}
    return DONE if bool(found.certified.all()) else NOT_CERTIFIED, document


def _data(path: str) -> tuple[Tensor, Tensor]:
    """Samples and labels of a file.

    Raises:
        InvalidExample: it cannot be read, or does not hold both.
    """
    import torch

    try:
        held = torch.load(Path(path), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make the unpickler raise anything; the message names the file
        raise InvalidExample(f"--data {path} cannot be read ({type(error).__name__}). Write it with torch.save.") from error
    if isinstance(held, dict) and {"samples", "labels"} <= set(held):
        held = held["samples"], held["labels"]
    if not isinstance(held, tuple | list) or len(held) != 2 or not all(isinstance(part, torch.Tensor) for part in held):
        raise InvalidExample(f"--data {path} holds no samples and labels. Write torch.save({{'samples': x, 'labels': y}}, file).")
    return held[0], held[1]


def _parser(description: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument(
        "checkpoint", type=str, help="an ONNX model, a Lightning checkpoint, a state_dict, or a whole module (with --trust)"
    )
    parser.add_argument("--model", type=str | None, help="module.Class, or a factory, that builds the module")
    add_query(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--trust", action="store_true", help="allow the file to run code while it is read (full pickle)")
    return parser
