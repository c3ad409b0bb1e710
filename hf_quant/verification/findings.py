"""What a verification says: findings that name the file, tensor, layer or figure, and the report that holds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Check = Literal["files", "plan", "results", "card", "metrics"]
CHECKS: tuple[Check, ...] = ("files", "plan", "results", "card", "metrics")


@dataclass(frozen=True)
class Finding:
    """One thing that is not as recorded, or (``fatal`` is False) that a reader should know.

    Attributes:
        check: which check found it.
        subject: the file, tensor, layer or figure.
        problem: what is wrong with it.
        fix: what to do.
        fatal: the checkpoint does not verify.
    """

    check: Check
    subject: str
    problem: str
    fix: str = ""
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.subject}: {self.problem}"


@dataclass(frozen=True)
class Report:
    """The outcome of a verification.

    Attributes:
        source: the directory or Hub id.
        commit: of a Hub id: the commit that was verified.
        digest: ``checkpoint_digest``; None when the manifest cannot be read.
        done: check -> what was compared, in words; a check that could not run is not in it.
        findings: in the order of the checks.
    """

    source: str
    commit: str | None
    digest: str | None
    done: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that keep it from verifying."""
        return tuple(finding for finding in self.findings if finding.fatal)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """The other findings."""
        return tuple(finding for finding in self.findings if not finding.fatal)

    @property
    def ok(self) -> bool:
        """Whether everything that was compared is as recorded."""
        return not self.problems

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {"ok": self.ok, **asdict(self)}


def note(check: Check, subject: str, problem: str, fix: str = "") -> Finding:
    """A finding that is no fault."""
    return Finding(check, subject, problem, fix, fatal=False)
