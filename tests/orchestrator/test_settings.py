"""What the environment may ask for."""

from ipaddress import ip_network

import pytest

from orchestrator.settings import SettingsError, load_settings


def test_pages_of_our_own_origin_and_of_those_named_may_attach():
    settings = load_settings(
        public_url="https://api.example.com/", allowed_origins="https://app.example.com, http://localhost:3000/"
    )
    assert settings.origins == {"https://api.example.com", "https://app.example.com", "http://localhost:3000"}


@pytest.mark.parametrize("origin", ["*", "example.com", "https://example.com/path"])
def test_what_is_no_origin_is_refused_at_the_start(origin):
    with pytest.raises(SettingsError, match="CODE_SESSIONS_ALLOWED_ORIGINS"):
        load_settings(allowed_origins=origin)


def test_trusted_proxies_are_addresses_and_networks():
    assert load_settings().trusted_proxies == ()
    settings = load_settings(gateway_trusted_proxies="127.0.0.1, 10.0.0.0/8,fd00::/8")
    assert settings.trusted_proxies == tuple(map(ip_network, ("127.0.0.1", "10.0.0.0/8", "fd00::/8")))


@pytest.mark.parametrize("text", ["everyone", "10.0.0.1/8", "127.0.0.1;10.0.0.1"])
def test_what_is_no_network_is_named(text):
    with pytest.raises(SettingsError, match="CODE_SESSIONS_GATEWAY_TRUSTED_PROXIES"):
        load_settings(gateway_trusted_proxies=text)
