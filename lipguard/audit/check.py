"""Re-checking a record against a checkpoint with nothing but the checker."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lipguard.audit.encoding import certificate_from_json
from lipguard.audit.recipe import rebuild
from lipguard.audit.record import STATUS_CODES, AuditRecord
from lipguard.audit.run import enclosed, hardware, versions
from lipguard.audit.weights import read_contents, sha256
from lipguard.certificate import Certificate
from lipguard.errors import Contradiction, LipguardError, NotCertified, UnreadableCheckpoint
from lipguard.network import Network
from lipguard.solvers.threads import limited_threads, one_thread
from lipguard.verify import verify

__all__ = ["Verification", "verify_record"]

ELSEWHERE = 1e-8
"""Relative difference allowed between a value recorded on another machine, or by other versions, and the one proved here:
sums in another order round differently, and a test of definiteness may then pass at a slightly other value."""


@dataclass(frozen=True, eq=False)
class Verification:
    """What was proved again.

    Attributes:
        lower, upper: the best verified ends, as proved here.
        proved: certificates proved here.
        claimed: certificates that rest on a solver's word, which nothing can check.
        tied, stored: tensors of the network that are read from the checkpoint by name, and those the record itself holds.
        exact: every value came out bit for bit as recorded.
    """

    lower: float
    upper: float
    proved: list[Certificate]
    claimed: list[Certificate]
    tied: int
    stored: int
    exact: bool


def verify_record(record: AuditRecord, checkpoint: str | os.PathLike[str], network: Network | None = None) -> Verification:
    """Prove every verified certificate of the record anew, for the network in the checkpoint.

    A value passes if the checker, given the certificate's evidence and the checkpoint's weights, arrives at that value:
    exactly, where this is the version of lipguard and torch, and the kind of processor, that wrote the record; else
    within 1e-8 relative, and the value proved here is the one reported.

    Args:
        record: from `read_record`, which has checked that it is as it was written.
        checkpoint: path of the checkpoint it is about.
        network: captured from the model's own class, to check the recorded structure as well.
    Raises:
        NotCertified: a weight, a multiplier, the domain, a value or anything else is not what was audited, or the record
            holds no verified enclosure. The message says which.
        UnreadableCheckpoint: there is no such checkpoint, or it is damaged.
    """
    try:
        found = sha256(checkpoint)
    except OSError as error:
        raise UnreadableCheckpoint(f"{checkpoint} cannot be read: {error.strerror or error}.") from error
    if found != record.checkpoint["sha256"]:
        raise NotCertified(
            f"{checkpoint} is not the file that was audited: its SHA-256 is {found[:12]}, "
            f"the record's {str(record.checkpoint['sha256'])[:12]}. A weight or something else in it was changed."
        )
    contents = read_contents(checkpoint)
    if (contents.sha256, contents.size) != (found, record.checkpoint["size"]):
        raise NotCertified(f"{checkpoint} changed while it was read, or the record states another size.")
    if (contents.step, contents.epoch) != (record.step, record.epoch):
        raise NotCertified(f"the record is of step {record.step}, the checkpoint of step {contents.step}.")
    if record.status not in STATUS_CODES:
        raise NotCertified(f"the record's status {record.status!r} is none that an audit has.")
    recipe = record.network
    if recipe is None or record.enclosure is None:
        raise NotCertified(f"the record certifies nothing: {record.failure or 'it holds no enclosure.'}")
    with limited_threads(1), one_thread():
        rebuilt = rebuild(recipe, contents.weights)
        shape = (rebuilt.inputs, rebuilt.outputs, rebuilt.neurons)
        if rebuilt.digest != recipe["digest"] or shape != (recipe["inputs"], recipe["outputs"], recipe["neurons"]):
            raise NotCertified(
                "the network rebuilt from the checkpoint is not the one audited: a weight or the structure differs."
            )
        if network is not None and network.digest != rebuilt.digest:
            raise NotCertified("the network of the model given is not the one audited: its structure or its weights differ.")
        return _prove(record, rebuilt)


def _prove(record: AuditRecord, network: Network) -> Verification:
    assert record.network is not None
    recorded = [certificate_from_json(value) for value in record.certificates]
    proved: list[Certificate] = []
    claimed: list[Certificate] = []
    exact = True
    strict = record.hardware == hardware() and all(record.versions.get(n) == versions()[n] for n in ("lipguard", "torch"))
    for stated, value in zip(recorded, record.certificates, strict=True):
        if value["norm"] != record.query["norm"] or value["domain"] != record.query["domain"]:
            raise NotCertified(f"the {stated.method} certificate is for another norm or domain than the record.")
        if stated.digest != network.digest:
            raise NotCertified(f"the {stated.method} certificate is of another network: a weight or the structure differs.")
        if stated.rigor != "verified":
            claimed.append(stated)
            continue
        try:
            certificate = verify(network, stated)
        except NotCertified:
            raise
        except (LipguardError, RuntimeError, ValueError, IndexError, TypeError) as error:
            raise NotCertified(f"the evidence of the {stated.method} certificate is damaged: {error}") from error
        same = certificate.value == stated.value
        if not same and (strict or abs(certificate.value - stated.value) > ELSEWHERE * abs(stated.value)):
            raise NotCertified(
                f"the {stated.method} certificate states {stated.side} bound {stated.value!r}, its evidence proves "
                f"{certificate.value!r}: the value, a multiplier or the domain was changed."
            )
        exact &= same
        proved.append(certificate)
    try:
        stated_enclosure = enclosed(recorded)
        enclosure = enclosed(proved)
    except Contradiction as error:
        raise NotCertified(str(error)) from error
    if enclosure is None or stated_enclosure != record.enclosure:
        raise NotCertified("the record's enclosure is not the one its certificates give.")
    steps = record.network["tensors"]
    tied, stored = (sum(kind in step for step in steps) for kind in ("entry", "value"))
    return Verification(enclosure["lower"], enclosure["upper"], proved, claimed, tied, stored, exact)
