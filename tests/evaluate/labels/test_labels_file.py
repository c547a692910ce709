"""labels.csv: what is read, what is written, and the one line that each bad file gets."""

import os

import pytest

from hafs_evaluate.labels.labels_file import Label, read_labels, write_labels
from hafs_jax.base.errors import UserError

KNOWN = {"baseline-s0", "adaptive-s0", "baseline"}


def test_labels_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "labels.csv"
    labels = [Label("baseline-s0", 3, 'months, "May" too', "me"), Label("adaptive-s0", 7, "é", "model tiny", 0.75)]
    write_labels(path, labels)
    assert read_labels(path, KNOWN) == labels
    assert [label.is_by_person for label in labels] == [True, False]
    assert read_labels(tmp_path / "none.csv") == []


def test_a_spreadsheets_file_and_rows_without_a_label_are_read(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes("\ufeffvariant,latent,label\r\nbaseline,#4, two  words \r\nbaseline,5,\r\n\r\n".encode())
    assert read_labels(path, KNOWN) == [Label("baseline", 4, "two words")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("variant,label\nbaseline,x\n", r"expected the columns variant, latent, label, found variant, label"),
        ("", r"expected the columns variant, latent, label, found none"),
        ("variant,latent,label\nbaseline,x,y\n", r"line 2: expected a latent's number, found 'x'"),
        ("variant,latent,label\nbaselin,1,y\n", r"line 2: no run or arm 'baselin'.*baseline"),
        ("variant,latent,label\nbaseline,1,a\nbaseline,1,b\n", r"line 3: baseline #1 has a label already"),
        ("variant,latent,label\nbaseline,1,a,b\n", r"line 2: found more columns than the head has"),
        ("variant,latent,label,score\nbaseline,1,a,high\n", r"line 2: expected a score between 0 and 1, found 'high'"),
        ('variant,latent,label\nbaseline,1,"a\n', r"line 2: expected a CSV row"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as found:
        read_labels(path, KNOWN)
    assert "\n" not in str(found.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(b"variant,latent,label\nbaseline,1,\xe9\n")
    with pytest.raises(UserError, match="expected UTF-8"):
        read_labels(path, KNOWN)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(UserError, match="found a pipe"):
        read_labels(tmp_path / "labels.csv", KNOWN)
