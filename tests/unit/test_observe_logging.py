from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaclass.observe.logging import log_to_run, redact

logger = logging.getLogger("megaclass.something")


def test_rank_0_logs_to_stderr_and_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_run(tmp_path / "run", rank=0):
        logger.info("step %d", 7)
        logger.debug("hidden")
    logger.warning("afterwards")
    for text in (capsys.readouterr().err, (tmp_path / "run/train.log").read_text()):
        assert "INFO    step 7" in text
        assert "hidden" not in text
        assert "afterwards" not in text


def test_other_ranks_only_warn_and_say_who_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_run(tmp_path, rank=3):
        logger.info("step 7")
        logger.warning("slow disk")
    text = capsys.readouterr().err
    assert "WARNING [rank 3] slow disk" in text
    assert "step 7" not in text
    assert not (tmp_path / "train.log").exists()


def test_everything_is_as_before_afterwards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger("megaclass")
    before = (root.level, root.propagate, list(root.handlers))
    with pytest.raises(RuntimeError), log_to_run(tmp_path, rank=0):
        raise RuntimeError
    assert (root.level, root.propagate, list(root.handlers)) == before
    logger.warning("reaches the others again")
    assert "reaches the others again" in caplog.text


def test_secrets_are_redacted_also_in_tracebacks(tmp_path: Path) -> None:
    with log_to_run(tmp_path, rank=0):
        try:
            raise OSError("cannot read s3://user:hunter2@store/x.tar")
        except OSError:
            logger.exception("reading https://store/x.tar?X-Amz-Signature=hunter2&part=1 failed")
    text = (tmp_path / "train.log").read_text()
    assert "hunter2" not in text
    assert "s3://***@store/x.tar" in text
    assert "X-Amz-Signature=***&part=1" in text


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://user@host/a", "https://***@host/a"),
        ("https://u:p@ss@host/a b@c", "https://***@host/a b@c"),
        ("path: s3:/me:secret@store/data", "path: s3:/***@store/data"),
        ("C:/me@work/data", "C:/me@work/data"),
        ("https://host/a?token=abc#end", "https://host/a?token=***#end"),
        ("https://host/a?page=2&api_key=abc", "https://host/a?page=2&api_key=***"),
        ("mail someone@host, at 3 samples/s", "mail someone@host, at 3 samples/s"),
        ("data/glyphs/train-000.tar", "data/glyphs/train-000.tar"),
    ],
)
def test_what_is_redacted(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@given(st.text(alphabet="abcXYZ019-._~%:", min_size=1), st.text(max_size=20), st.text(max_size=20))
def test_a_password_never_survives(secret: str, before: str, after: str) -> None:
    text = redact(f"{before} s3://user:SECRET{secret}@host/path {after}")
    assert f"SECRET{secret}" not in text
    assert "host/path" in text
