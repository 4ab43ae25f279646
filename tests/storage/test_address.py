"""Addresses: remote or local, and no secrets in them."""

import pytest

from maskwise.errors import UserError
from maskwise.storage import address


def test_remote_and_local_addresses():
    assert [address.is_remote(text) for text in ("s3://b/x", "HTTPS://h/x", "file:///x", "/a/b", "C:\\x", "x.tar")] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert address.local("file:///a%20b/c.tar") == "/a b/c.tar" and address.local("s3://b") == "s3://b"
    assert address.bucket_of("s3://b/x/y") == "s3://b" and address.protocol_of("GS://b/x") == "gs"
    assert address.was_remote("s3:/b/x") and not address.was_remote("/s3:/b")


@pytest.mark.parametrize(
    "text", ["s3://KEY:SECRET@b/x", "https://user:SECRET@h/x.tar", "https://h/x.tar?X-Amz-Signature=SECRET"]
)
def test_addresses_with_secrets_are_refused_without_repeating_them(text):
    with pytest.raises(UserError, match="^train.mirror: the address ") as caught:
        address.check(text, "train.mirror")
    assert "SECRET" not in str(caught.value) and "\n" not in str(caught.value)


def test_queries_are_removed_from_texts():
    text = "cannot get https://h/x?sig=SECRET&b=1 (status 500)"
    assert address.without_queries(text) == "cannot get https://h/x?... (status 500)"
