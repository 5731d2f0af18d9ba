"""Base URL and key are validated on construction, so the key can neither leak nor fail later."""

import pytest

from nanobanana_async import ConfigurationError, NanoBananaClient
from nanobanana_async.wire.endpoint import ApiKey, Endpoint


@pytest.mark.parametrize(
    "pasted",
    ["dk-1", " dk-1\n", "Bearer dk-1", "bearer  dk-1 ", "\tdk-1\r\n"],
    ids=["clean", "blanks", "Bearer", "bearer", "tab"],
)
def test_text_pasted_around_a_key_is_stripped(pasted: str) -> None:
    """Newlines, spaces and the word Bearer are removed."""
    assert Endpoint.resolve(ApiKey(pasted), None).headers["Authorization"] == "Bearer dk-1"


@pytest.mark.parametrize("key", ["dk CANARY", "dk-CANARY\u20ac", "dk-\x00CANARY", "dk-CANARY\nX: y"])
def test_an_invalid_key_is_rejected_without_being_shown(key: str) -> None:
    """Header injection and encoding errors end here."""
    with pytest.raises(ConfigurationError, match="api_key") as caught:
        NanoBananaClient(key)
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("key", [None, "", "  ", "Bearer "])
def test_a_missing_key_names_the_variable_to_set(key: str | None) -> None:
    """The error names DEFAPI_API_KEY."""
    with pytest.raises(ConfigurationError, match=r"no API key: set DEFAPI_API_KEY or pass api_key=\.\.\."):
        NanoBananaClient(key)


def test_the_key_is_found_under_the_names_users_already_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first variable that is set and not empty is used."""
    for name, value in {"DEFAPI_API_KEY": "", "DEFAPI_KEY": "dk-2", "NANO_BANANA_API_KEY": "dk-3"}.items():
        monkeypatch.setenv(name, value)
    assert Endpoint.resolve(None, None).headers["Authorization"] == "Bearer dk-2"


def test_the_base_url_is_given_or_from_the_environment_or_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument comes before the environment, and a trailing slash is ignored."""
    assert Endpoint.resolve(ApiKey("dk-1"), None).base_url == "https://api.defapi.org"
    monkeypatch.setenv("DEFAPI_BASE_URL", "https://proxy.example/")
    assert Endpoint.resolve(ApiKey("dk-1"), None).base_url == "https://proxy.example"
    assert Endpoint.resolve(ApiKey("dk-1"), "https://other.example/v1/").base_url == "https://other.example/v1"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("api.defapi.org", "absolute"),
        ("ftp://api.defapi.org", "absolute"),
        ("https://user:pass@api.defapi.org", "user name or password"),
        ("https://api.defapi.org?x=1", "query"),
        ("http://api.defapi.org", "unencrypted"),
        ("http://8.8.8.8", "unencrypted"),
        pytest.param("http://134744072", "unencrypted", id="S2-integer"),
        pytest.param("http://0x8080808", "unencrypted", id="S2-hexadecimal"),
        pytest.param("http://8.8.2056", "unencrypted", id="S2-three-parts"),
        pytest.param("http://[::ffff:8.8.8.8]", "unencrypted", id="S2-mapped"),
        pytest.param("http://[64:ff9b::808:808]", "unencrypted", id="S2-nat64"),
        ("https://api.defapi.org\r\nX: y", "control"),
    ],
)
def test_a_base_url_that_would_fail_or_leak_is_rejected(url: str, says: str) -> None:
    """The key is sent over HTTPS, or to a private address."""
    with pytest.raises(ConfigurationError, match=says):
        NanoBananaClient("dk-1", base_url=url)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8787",
        "http://localhost",
        "http://simulator:8787",
        "http://10.1.2.3",
        "http://[::1]:1",
        "http://2130706433",
        "http://[::ffff:10.0.0.1]",
        "http://nb.internal",
    ],
)
def test_plain_http_is_accepted_for_private_hosts(url: str) -> None:
    """Simulators and sidecars use plain HTTP."""
    assert NanoBananaClient("dk-1", base_url=url)


def test_the_key_is_in_no_repr() -> None:
    """Neither the client nor its parts show the key."""
    client = NanoBananaClient("dk-CANARY")
    assert "CANARY" not in repr(client) + repr(vars(client))
