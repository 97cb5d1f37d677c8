from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaclass.data.address import SCHEMES, Address, parse_location, redact


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("https://host/a/b/", Address("https", "host", "/a/b")),
        ("HTTP://host:8080", Address("http", "host:8080", "")),
        ("http://[::1]:80/x", Address("http", "[::1]:80", "/x")),
        ("s3://bucket.name/pre_fix/a-b", Address("s3", "bucket.name", "/pre_fix/a-b")),
        ("gs://bucket", Address("gs", "bucket", "")),
    ],
)
def test_addresses(text: str, found: Address) -> None:
    assert parse_location(text) == found
    assert parse_location(str(found)) == found
    assert parse_location(found) is found
    assert found.file("x.tar") == f"{found}/x.tar"


@pytest.mark.parametrize("text", ["data/glyphs", "/data", "./pipe:x", "a/b:c", "x:y", "~/data", ""])
def test_folders(text: str) -> None:
    assert parse_location(text) == Path(text)
    assert parse_location(Path(text)) == Path(text)


@pytest.mark.parametrize(
    "text",
    [
        "pipe:cat x", "file:x", "file:///x", "ftp://h/x", "data:,x", "github://a:b@/", "zip::s3://b/x", "s3a://b/x",
        "https://", "https:///x", "https:x", "https:/h/x", "https://h//x", "https://h/a b", "https://h/\nx", "https://h/x*",
        "https://h/./x", "https://h/%2e%2e/x", "https://h/a%2fb", "https://h:0x1/x", "https://h:99999/x", "s3://b:80/x",
        "https://u@h/x", "https://u:p@h/x", "https://h/x?q", "https://h/x#f", "https://h\\x/y", "s3://b/[a]", "https://h/\u5b57",
    ],
)  # fmt: skip
def test_neither(text: str) -> None:
    with pytest.raises(ValueError, match=r"refused|address"):
        parse_location(text)


def test_a_path_that_was_an_address_is_noticed() -> None:
    with pytest.raises(ValueError, match="an address must be given as text"):
        parse_location(Path("https://host/folder"))
    with pytest.raises(ValueError, match="must be a folder, or an address"):
        parse_location(3)


@given(st.one_of(st.text(), st.builds("{}://{}".format, st.sampled_from([*SCHEMES, "pipe", "file"]), st.text())))
def test_any_text_is_a_folder_an_address_or_refused(text: str) -> None:
    try:
        found = parse_location(text)
    except ValueError:
        return
    if isinstance(found, Address):
        assert found.scheme in SCHEMES
        assert not set("@?#*\\ \n") & set(found.host)
        assert not set("?#*\\ \n") & set(found.path)
        assert ".." not in found.path.split("/")
    else:
        assert found == Path(text)


_SECRET = st.text("abcdefghij0123456789%:-_.", min_size=6, max_size=20)


@given(
    _SECRET, st.sampled_from(["https://me:{}@host/x", "s3://{}@b/x", "GET https://h/x?sig={} failed", "'http://h/?{}'"])
)
def test_secrets_are_taken_out(secret: str, form: str) -> None:
    assert secret not in redact(f"cannot read {form.format(secret)}, attempt 3")
    assert redact(f"cannot read {form.format(secret)}").startswith("cannot read ")


def test_what_is_no_secret_stays() -> None:
    text = "https://host/a/b.tar could not be fetched in 3 attempts; why? see s3://bucket/x and me@host"
    assert redact(text) == text
