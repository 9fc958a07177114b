"""Escape sequences out, text left, wherever the pieces are cut."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.terminal.plain_text import PlainText


def plain(*pieces):
    text = PlainText()
    return "".join(text.feed(piece) for piece in pieces) + text.rest()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\tb\r\nc\n", "a\tb\nc\n"),
        ("\x1b[1;31mred\x1b[0m\x1b[?2004h", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPq#0;2;0\x1b\\sixel", "sixel"),
        ("\x1b_apc\x1b\\\x1b^pm\x1b\\\x1bXsos\x1b\\end", "end"),
        ("\x1b(B\x1b)0\x1b#8\x1b%Gset", "set"),
        ("\x1b7\x1b8\x1bM\x1bc\x1b=\x1b>two", "two"),
        ("\x9b31mc1\x9d0;title\x9cosc\x90dcs\x9cend", "c1oscend"),
        ("bell\x07\x00\x0b\x0c\x7fgone", "bellgone"),
        ("10%\r20%\r100%\n", "100%\n"),
        ("longer\rshort\n", "shortr\n"),
        ("longer\r\x1b[Kshort\n", "short\n"),
        ("helo\b\blo\n", "helo\n"),
        ("helo\b\x1b[Klo\n", "hello\n"),
        ("\b\b\ba", "a"),
        ("a\x1b[3\n1mb", "a\nb"),  # a control character inside of a sequence is carried out
        ("a\x1b[31\x18mb", "amb"),  # CAN ends it
        ("a\x1b]0;x\x1b[31mb", "ab"),  # an escape that does not end the string begins another sequence
        ("€ 漢字 \U0001f600", "€ 漢字 \U0001f600"),
        ("a\x1b", "a"),
        ("a\x1b[", "a"),
    ],
)
def test_what_is_no_text_goes_and_edited_lines_stand_as_they_were_at_last(raw, expected):
    assert plain(raw) == expected
    assert plain(*raw) == expected  # cut between any two characters


@given(st.lists(st.text(alphabet="ab€\x1b[]\\0;Km\x07\r\n\b\x9b\x9c\x18PX(", max_size=20), max_size=8))
def test_where_the_pieces_are_cut_makes_no_difference_and_no_control_character_is_left(pieces):
    whole = plain("".join(pieces))
    assert plain(*pieces) == whole
    assert not any(ord(character) < 32 and character != "\n" for character in whole)
    assert "\x9b" not in whole


def test_what_never_ends_is_neither_kept_nor_slow():
    text = PlainText()
    began = time.process_time()
    for start in ("", "\x1b]0;", "\x18\x1b[", "\x18"):
        text.feed(start)
        for _ in range(100):
            text.feed("1" * 64 * 1024)
    assert time.process_time() - began < 5
    assert len(text.rest()) <= 128 * 1024
