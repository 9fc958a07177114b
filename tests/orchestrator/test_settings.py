"""What the environment may ask for."""

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
