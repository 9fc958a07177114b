"""What the person who starts `serve` is told."""

from pydantic import SecretStr

from orchestrator.cli.serve import _welcome
from orchestrator.settings import Settings

ADMIN_KEY = "an-operators-own-value-0123456789"


def test_a_key_that_was_just_made_is_shown_and_stands_in_the_tour():
    text = _welcome(Settings(port=4711), "csk_new")
    assert "shown only this once, keep it:\n\n  csk_new\n" in text
    assert "export KEY=csk_new\n" in text
    assert "export API=http://127.0.0.1:4711/api/v1\n" in text


def test_a_key_from_the_settings_is_named_but_not_shown():
    text = _welcome(Settings(admin_key=SecretStr(ADMIN_KEY)), None)
    assert "the value of CODE_SESSIONS_ADMIN_KEY" in text
    assert 'export KEY="$CODE_SESSIONS_ADMIN_KEY"\n' in text
    assert ADMIN_KEY not in text


def test_at_a_later_start_the_reader_is_told_where_keys_come_from():
    text = _welcome(Settings(), None)
    assert "shown at the first start" in text
    assert "export KEY=your-key\n" in text
