"""Audits of checkpoints: bounds with their evidence in a record that anybody can check without the training script."""

from lipguard.audit.check import Verification, verify_record
from lipguard.audit.record import STATUS_CODES, AuditRecord, read_record, record_path, write_record
from lipguard.audit.run import Options, Outcome, audit_checkpoint, audit_network

__all__ = [
    "STATUS_CODES",
    "AuditRecord",
    "Options",
    "Outcome",
    "Verification",
    "audit_checkpoint",
    "audit_network",
    "read_record",
    "record_path",
    "verify_record",
    "write_record",
]
