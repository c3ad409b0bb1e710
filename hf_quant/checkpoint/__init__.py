"""Checkpoint directories: read and validate them, write them whole or not at all, record and verify their digests."""

from __future__ import annotations

from hf_quant.checkpoint.atomic import atomic_directory, atomic_write, check_output
from hf_quant.checkpoint.contents import MANIFEST_FILE, README_FILE, RESULTS_FILE, copy_side_files, is_ours
from hf_quant.checkpoint.headers import TensorInfo, check_directory, read_headers, read_json, weight_files
from hf_quant.checkpoint.manifest import (
    Evidence,
    FileEntry,
    Manifest,
    Verification,
    changed_tensors,
    checkpoint_digest,
    file_sha256,
    is_sealed,
    read_manifest,
    record_evidence,
    require_verified,
    verify_evidence,
    verify_manifest,
    write_manifest,
)

__all__ = [
    "MANIFEST_FILE",
    "README_FILE",
    "RESULTS_FILE",
    "Evidence",
    "FileEntry",
    "Manifest",
    "TensorInfo",
    "Verification",
    "atomic_directory",
    "atomic_write",
    "changed_tensors",
    "check_directory",
    "check_output",
    "checkpoint_digest",
    "copy_side_files",
    "file_sha256",
    "is_ours",
    "is_sealed",
    "read_headers",
    "read_json",
    "read_manifest",
    "record_evidence",
    "require_verified",
    "verify_evidence",
    "verify_manifest",
    "weight_files",
    "write_manifest",
]
