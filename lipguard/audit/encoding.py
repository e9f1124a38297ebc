"""Tensors and certificates as the JSON values of an audit record, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lipguard.certificate import Certificate
from lipguard.plain import finite, from_plain, to_plain

__all__ = ["certificate_from_json", "certificate_json", "finite", "from_plain", "to_plain"]


def certificate_json(certificate: Certificate) -> dict[str, Any]:
    """The certificate with all of its evidence as a JSON value."""
    return certificate.to_dict()


def certificate_from_json(value: Mapping[str, Any]) -> Certificate:
    """Inverse of `certificate_json`.

    Raises:
        NotCertified: a field is missing or unknown, or has no meaning.
    """
    return Certificate.from_dict(value)
