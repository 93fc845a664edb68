import pytest

from job.config import CIFAR10_URL, redact_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (CIFAR10_URL, CIFAR10_URL),
        ("https://me:secret@mirror:8080/c.tar.gz", "https://REMOVED@mirror:8080/c.tar.gz"),
        ("https://me@mirror/c.tar.gz", "https://REMOVED@mirror/c.tar.gz"),
        ("https://a@b:secret@mirror/c", "https://REMOVED@mirror/c"),
        ("me:secret@mirror/c", "REMOVED@mirror/c"),
        ("https://mirror/a@b.tar.gz", "https://mirror/a@b.tar.gz"),
        ("https://mirror/c?token=secret&x=1", "https://mirror/c?REMOVED"),
        ("https://mirror/c#secret", "https://mirror/c#REMOVED"),
        ("https://mirror/c?a=secret\nsecret", "https://mirror/c?REMOVED"),
        ("", ""),
    ],
)
def test_what_opens_a_door_is_removed(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert redact_url(shown) == shown
