from ipaddress import ip_network

import pytest

from orchestrator.settings import SettingsError, load_settings


def test_trusted_proxies_are_addresses_and_networks():
    assert load_settings().trusted_proxies == ()
    settings = load_settings(gateway_trusted_proxies="127.0.0.1, 10.0.0.0/8,fd00::/8")
    assert settings.trusted_proxies == tuple(map(ip_network, ("127.0.0.1", "10.0.0.0/8", "fd00::/8")))


@pytest.mark.parametrize("text", ["everyone", "10.0.0.1/8", "127.0.0.1;10.0.0.1"])
def test_what_is_no_network_is_named(text):
    with pytest.raises(SettingsError, match="CODE_SESSIONS_GATEWAY_TRUSTED_PROXIES"):
        load_settings(gateway_trusted_proxies=text)
