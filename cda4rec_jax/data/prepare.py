"""From any source to a prepared folder, with an account of what was dropped."""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cda4rec_jax.data.assemble import Counts, counts
from cda4rec_jax.data.interactions import Finding, Interactions
from cda4rec_jax.data.interactions import k_core as thin_to_k_core
from cda4rec_jax.data.prepared import DATA_FOLDER, METADATA, Progress, metadata_of, recognises
from cda4rec_jax.data.sources import read_source
from cda4rec_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What was read, what was dropped and why, and what was written."""

    source: str
    out: str
    k_core: int
    before: Counts
    after: Counts
    findings: tuple[Finding, ...]
    has_timestamps: bool
    fingerprint: str
    period: tuple[str, str]  # days of the first and of the last event, where timestamps are more than an order

    def lines(self) -> list[str]:
        """The report as text, one line for each fact."""
        first, last = self.period
        time = f"unix seconds, {first} to {last}" if self.has_timestamps else "only an order of each user's events"
        return [
            f"read {self.source}: {self.before.line()}",
            *(finding.line() for finding in self.findings),
            f"timestamps: {time}",
            f"wrote {self.out}: {self.after.line()} ({self.k_core}-core, fingerprint {self.fingerprint[:12]})",
        ]


def prepare(source: str, out: str | Path, k_core: int = 5, progress: Progress | None = None) -> PrepareReport:
    """Reads a source, validates it, thins it to its k-core, and writes it as a prepared folder.

    A prepared dataset that is already at ``out`` is replaced once the new one is complete, and stays untouched if anything fails.

    Args:
        source: as for ``read_source``.
        out: the folder to write; it is made if need be.
        k_core: events that every item, and every user, must have; 1 keeps every item.
        progress: is told the users written and all users.

    Raises:
        UserError: if the source is bad, nothing remains of it, or ``out`` holds something else or cannot be written.
    """
    out = Path(out).expanduser()
    with _explained(out):
        _check_destination(out)
        reading = read_source(source)
        data, dropped = thin_to_k_core(reading.interactions, k_core)
    found = {"before": reading.found, "findings": reading.findings + dropped}
    return write_prepared(data, out, source, k_core=k_core, progress=progress, **found)


def write_prepared(
    data: Interactions,
    out: str | Path,
    source: str,
    *,
    before: Counts | None = None,
    findings: tuple[Finding, ...] = (),
    k_core: int = 1,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes interactions as they are as a prepared folder: items without events stay. ``source`` says what they are.

    A prepared dataset that is already at ``out`` is replaced once the new one is complete.

    Raises:
        UserError: ``out`` holds something else or cannot be written.
    """
    out = Path(out).expanduser()
    report = PrepareReport(
        source=source,
        out=str(out),
        k_core=k_core,
        before=before or counts(data),
        after=counts(data),
        findings=findings,
        has_timestamps=data.has_timestamps,
        fingerprint=data.fingerprint,
        period=(_day(data.timestamps.min()), _day(data.timestamps.max())),
    )
    with _explained(out):
        _check_destination(out)
        _write(data, report, out, progress)
    return report


def _day(seconds: float) -> str:
    """In NumPy, which knows years of any number of digits; timestamps may be anything finite."""
    return str(np.datetime64(int(np.clip(seconds, -1e15, 1e15)), "s").astype("datetime64[D]"))


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """What the operating system refuses is the destination's; the source's troubles are UserErrors by then."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {out}: {reason}; choose a folder that can be written, with --out") from error


def _check_destination(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write to {out}: it is a file; choose a folder, with --out")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    others = [name for name in names if not DATA_FOLDER.fullmatch(name)]
    if others and not recognises(out):
        raise UserError(f"{out} holds {', '.join(others[:5])}, no prepared dataset: choose an empty or a new folder, with --out")


def _write(data: Interactions, report: PrepareReport, out: Path, progress: Progress | None) -> None:
    from cda4rec_jax.data.builder import write_users  # takes seconds to import, and a bad source needs no builder

    data_folder = out / f"data-{secrets.token_hex(4)}"
    data_folder.mkdir(parents=True)
    try:
        write_users(data, data_folder, progress)
        kept = {name: value for name, value in asdict(report).items() if name != "out"}  # the folder may be moved
        metadata = metadata_of(data, data_folder.name) | {"report": kept}
        (data_folder / METADATA).write_text(json.dumps(metadata), encoding="utf-8")
        (data_folder / METADATA).replace(out / METADATA)
    except BaseException:
        shutil.rmtree(data_folder, ignore_errors=True)
        raise
    for path in out.iterdir():
        if DATA_FOLDER.fullmatch(path.name) and path != data_folder:
            shutil.rmtree(path, ignore_errors=True)
