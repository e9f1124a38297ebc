"""Tensors, certificates and evidence as JSON values and back, bit for bit."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeGuard, get_args

import torch
from torch import Tensor

from lipguard.certificate import (
    Certificate,
    ChannelMultipliers,
    Evidence,
    Factors,
    Leaf,
    LocalMultipliers,
    Magnitudes,
    Multipliers,
    Part,
    Partition,
    Product,
    Rigor,
    Side,
    Slopes,
    SolverReport,
    WeightedMultipliers,
    Witness,
    domain_from_json,
    norm_pair,
)
from lipguard.errors import LipguardError, NotCertified

__all__ = ["certificate_from_json", "certificate_json", "finite", "from_plain", "to_plain"]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.int64, torch.int32, torch.int8, torch.bool)
}


def to_plain(tensor: Tensor) -> dict[str, Any]:
    """Shape, dtype and the little-endian bytes in base64. Floating-point values are stored as float64."""
    plain = tensor.detach().to("cpu")
    plain = (plain.double() if plain.is_floating_point() else plain).contiguous()
    array = plain.numpy()
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return {
        "dtype": str(plain.dtype).removeprefix("torch."),
        "shape": list(plain.shape),
        "base64": base64.b64encode(data).decode("ascii"),
    }


def from_plain(value: Mapping[str, Any]) -> Tensor:
    """Inverse of `to_plain`.

    Raises:
        NotCertified: the bytes do not fit the shape.
    """
    try:
        dtype, shape = _DTYPES[value["dtype"]], [int(n) for n in value["shape"]]
        data = base64.b64decode(value["base64"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise NotCertified(f"a tensor of the record is damaged: {type(error).__name__}: {error}.") from error
    size = torch.empty(0, dtype=dtype).element_size()
    if any(n < 0 for n in shape) or len(data) != size * math.prod(shape):
        raise NotCertified(f"a tensor of the record is damaged: {len(data)} bytes for shape {shape} of {value['dtype']}.")
    if not data:
        return torch.zeros(shape, dtype=dtype)
    # Every processor that PyTorch supports with these wheels is little-endian, so the bytes are the numbers.
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def finite(value: object) -> Any:
    """A JSON value in which inf and nan, which JSON has not, are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def certificate_json(certificate: Certificate) -> dict[str, Any]:
    """The certificate with all of its evidence as a JSON value."""
    return {
        "value": certificate.value,
        "side": certificate.side,
        "norm": [str(p) for p in certificate.norm],
        "domain": None if certificate.domain is None else finite(certificate.domain.json()),
        "digest": certificate.digest,
        "method": certificate.method,
        "rigor": certificate.rigor,
        "seconds": certificate.seconds,
        "note": certificate.note,
        "details": finite(certificate.details),
        "evidence": _evidence_json(certificate.evidence),
    }


def certificate_from_json(value: Mapping[str, Any]) -> Certificate:
    """Inverse of `certificate_json`.

    Raises:
        NotCertified: a field is missing or has no meaning.
    """
    try:
        if value["side"] not in get_args(Side) or value["rigor"] not in get_args(Rigor):
            raise ValueError(f"side {value['side']!r}, rigor {value['rigor']!r}")
        if not isinstance(value["value"], float) or not math.isfinite(value["value"]):
            raise ValueError(f"value {value['value']!r} is no finite number")
        return Certificate(
            value["value"],
            value["side"],
            norm_pair(tuple(value["norm"])),
            domain_from_json(value["domain"]),
            str(value["digest"]),
            str(value["method"]),
            _evidence(value["evidence"]),
            value["rigor"],
            float(value["seconds"]),
            str(value["note"]),
            dict(value["details"]),
        )
    except (LipguardError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise NotCertified(f"a certificate of the record is damaged: {type(error).__name__}: {error}") from error


def _evidence_json(evidence: Evidence) -> dict[str, Any]:
    match evidence:
        case Factors():
            norms = {str(node): float(norm) for node, norm in evidence.norms.items()}
            return {"kind": "factors", "norms": norms, "derivation": evidence.derivation}
        case Multipliers():
            return {"kind": "multipliers", "t": to_plain(evidence.t), "rho": float(evidence.rho)}
        case LocalMultipliers():
            return {"kind": "local-multipliers", "t": to_plain(evidence.t), "rho": float(evidence.rho)}
        case Slopes():
            return {"kind": "slopes"}
        case Magnitudes():
            return {"kind": "magnitudes", "vectors": {str(node): to_plain(y) for node, y in evidence.vectors.items()}}
        case WeightedMultipliers():
            parts = [{f.name: _field_json(getattr(part, f.name)) for f in fields(part)} for part in evidence.parts]
            return {"kind": "weighted-multipliers", "parts": parts}
        case ChannelMultipliers():
            t = {str(node): to_plain(values) for node, values in evidence.t.items()}
            sides = {str(node): list(side) for node, side in evidence.sides.items()}
            return {"kind": "channel-multipliers", "t": t, "rho": float(evidence.rho), "sides": sides}
        case Witness():
            return {"kind": "witness", "point": to_plain(evidence.point), "direction": to_plain(evidence.direction)}
        case Partition():
            leaves = [{f.name: _field_json(getattr(leaf, f.name)) for f in fields(leaf)} for leaf in evidence.leaves]
            return {"kind": "partition", "value": float(evidence.value), "leaves": leaves}
        case Product():
            factors = [_evidence_json(factor) for factor in evidence.factors]
            return {"kind": "product", "cuts": [int(cut) for cut in evidence.cuts], "factors": factors}
        case SolverReport():
            return {"kind": "solver-report", "solver": evidence.solver, "message": evidence.message}


def _evidence(value: Mapping[str, Any]) -> Evidence:
    match value["kind"]:
        case "factors":
            derivation = value.get("derivation", "norm")
            if derivation not in ("norm", "toeplitz"):
                raise ValueError(f"no derivation of factors is called {derivation!r}")
            return Factors({int(node): float(norm) for node, norm in value["norms"].items()}, derivation)
        case "multipliers":
            return Multipliers(from_plain(value["t"]), float(value["rho"]))
        case "local-multipliers":
            return LocalMultipliers(from_plain(value["t"]), float(value["rho"]))
        case "slopes":
            return Slopes()
        case "magnitudes":
            return Magnitudes({int(node): from_plain(y) for node, y in value["vectors"].items()})
        case "weighted-multipliers":
            return WeightedMultipliers(tuple(Part(**{name: _field(f) for name, f in part.items()}) for part in value["parts"]))
        case "channel-multipliers":
            t = {int(node): from_plain(values) for node, values in value["t"].items()}
            sides = {int(node): tuple(int(m) for m in side) for node, side in value["sides"].items()}
            return ChannelMultipliers(t, float(value["rho"]), sides)
        case "witness":
            return Witness(from_plain(value["point"]), from_plain(value["direction"]))
        case "partition":
            leaves = tuple(Leaf(**{name: _field(field) for name, field in leaf.items()}) for leaf in value["leaves"])
            return Partition(leaves, float(value["value"]))
        case "product":
            factors = tuple(_evidence(factor) for factor in value["factors"])
            return Product(tuple(int(cut) for cut in value["cuts"]), tuple(f for f in factors if _of_a_piece(f)))
        case "solver-report":
            return SolverReport(str(value["solver"]), str(value["message"]))
        case kind:
            raise ValueError(f"no evidence is called {kind!r}")


def _of_a_piece(evidence: Evidence) -> TypeGuard[Multipliers | Factors]:
    if not isinstance(evidence, Multipliers | Factors):
        raise ValueError(f"{type(evidence).__name__} is no evidence of a piece")
    return True


def _field_json(value: Tensor | float | None) -> object:
    return to_plain(value) if isinstance(value, Tensor) else value


def _field(value: Any) -> Any:
    return from_plain(value) if isinstance(value, dict) else value
