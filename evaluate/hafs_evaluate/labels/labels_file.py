"""OUT/<profile>/labels.csv: what the latents of each run are called, by whom, and how well the label does.

The columns are variant, latent and label, and where they are known source and score. `variant` is a run or an arm of
the report. A row without a source, or whose source does not begin with "model ", is a person's.
"""

import csv
import io
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_text
from hafs_jax.base.foreign import refuse_special
from hafs_jax.base.options import did_you_mean

LABELS = "labels.csv"
COLUMNS = ("variant", "latent", "label", "source", "score")
REQUIRED = COLUMNS[:3]
BY_MODEL = "model "  # how the source of a model's label begins


@dataclass(frozen=True)
class Label:
    """What one latent of a run or an arm is called."""

    variant: str
    latent: int
    text: str
    source: str = ""
    score: float | None = None  # balanced accuracy of the label in telling contexts apart; None: not scored

    @property
    def is_by_person(self) -> bool:
        return not self.source.startswith(BY_MODEL)


def read_labels(path: Path, variants: Collection[str] | None = None) -> list[Label]:
    """The labels of the file, in its order; none where there is no file.

    `UserError`, with the line, where a column is missing, a number is none, a label stands twice, or a variant is not
    one of `variants`. A row with an empty label is passed over, so that a list of latents can be filled in by and by.
    """
    if not path.exists():
        return []
    refuse_special(path, "a file of labels")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a spreadsheet may begin it with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected UTF-8 text, found byte {error.start} that is not; save it as UTF-8"
        ) from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    labels: dict[tuple[str, int], Label] = {}
    try:
        missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
        if missing:
            found = ", ".join(reader.fieldnames or ()) or "none"
            raise UserError(f"{path}: expected the columns {', '.join(REQUIRED)}, found {found}")
        for row in reader:
            label = _label(row, f"{path}, line {reader.line_num}", variants)
            if label is None:
                continue
            if (label.variant, label.latent) in labels:
                raise UserError(
                    f"{path}, line {reader.line_num}: {label.variant} #{label.latent} has a label already; keep one"
                )
            labels[label.variant, label.latent] = label
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: expected a CSV row, found: {error}") from None
    return list(labels.values())


def write_labels(path: Path, labels: Iterable[Label]) -> None:
    """Writes the file, whole or not at all."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for label in labels:
        score = "" if label.score is None else f"{label.score:.3f}"
        writer.writerow([label.variant, label.latent, label.text, label.source, score])
    write_text(path, buffer.getvalue())


def _label(row: dict[str, str | None], where: str, variants: Collection[str] | None) -> Label | None:
    variant, latent, text = ((row.get(name) or "").strip() for name in REQUIRED)
    if row.get(None):  # type: ignore[call-overload]  # DictReader's key for what is left over
        raise UserError(f"{where}: found more columns than the head has; put a label with commas in quotes")
    if not text:
        return None
    if not latent.removeprefix("#").isdecimal():
        raise UserError(f"{where}: expected a latent's number, found {latent!r}")
    if variants is not None and variant not in variants:
        raise UserError(f"{where}: no run or arm {variant!r}{did_you_mean(variant, variants)}")
    score = (row.get("score") or "").strip()
    try:
        value = float(score) if score else None
    except ValueError:
        raise UserError(f"{where}: expected a score between 0 and 1, found {score!r}") from None
    return Label(
        variant, int(latent.removeprefix("#")), " ".join(text.split()), (row.get("source") or "").strip(), value
    )
