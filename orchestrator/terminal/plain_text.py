"""Terminal output as plain text: a state machine over ECMA-48's control functions that works across any borders.

What is left are the characters, tabs and line feeds. CSI, OSC (ended by BEL or ST), DCS, APC, PM and SOS strings,
escapes with intermediates (character sets) and all other control characters go. Of what moves the cursor only three
things have an effect, those that lines are commonly edited with: a carriage return (what follows overwrites the line),
a backspace, and EL 0, which erases to the end of the line. A program that draws a whole screen leaves its text in the
order drawn.
"""

import re
from enum import Enum, auto
from typing import Final

_LINE_CHARACTERS_MAX: Final = 64 * 1024  # a longer line is given out in pieces that nothing can overwrite any more
_PARAMETERS_MAX: Final = 16  # only short ones have a meaning here

_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # all but the tab
_ESCAPE_END: Final = re.compile(r"[^\x20-\x2f]")
_CSI_END: Final = re.compile(r"[^\x20-\x3f]")
_STRING_END: Final = re.compile(r"[\x07\x18\x1a\x1b\x9c]")
_CANCELS: Final = "\x18\x1a"  # CAN and SUB end any sequence
_STRING_STARTS: Final = "P]X^_\x90\x9d\x98\x9e\x9f"  # DCS, OSC, SOS, PM, APC: after ESC, and as one character


class _State(Enum):
    TEXT = auto()
    ESCAPE = auto()  # after ESC, or ESC and intermediates
    CSI = auto()
    STRING = auto()
    STRING_ESCAPE = auto()  # after ESC in a string: `\` ends it


class PlainText:
    """`feed` the decoded output in pieces cut anywhere, then take the `rest`."""

    def __init__(self) -> None:
        self._state = _State.TEXT
        self._parameters = ""
        self._line: list[str] = []
        self._column = 0
        self._done: list[str] = []

    def feed(self, text: str) -> str:
        """The lines that are complete now, and no part of one that may still change."""
        position = 0
        while position < len(text):
            match self._state:
                case _State.TEXT:
                    position = self._text(text, position)
                case _State.ESCAPE:
                    position = self._escape(text, position)
                case _State.CSI:
                    position = self._csi(text, position)
                case _State.STRING:
                    position = self._string(text, position)
                case _State.STRING_ESCAPE:
                    # ESC ends the string anyhow: a backslash belongs to it, anything else begins another sequence.
                    ended = text[position] == "\\"
                    self._state = _State.TEXT if ended else _State.ESCAPE
                    position += ended
        done, self._done = "".join(self._done), []
        return done

    def rest(self) -> str:
        """The last line, which no line feed has ended."""
        line, self._line, self._column = "".join(self._line), [], 0
        return line

    def _text(self, text: str, position: int) -> int:
        found = _CONTROL.search(text, position)
        end = found.start() if found else len(text)
        if end > position:
            self._put(text[position:end])
        if found is None:
            return end
        self._control(found[0])
        return end + 1

    def _control(self, character: str) -> None:
        match character:
            case "\n":
                self._done.append("".join(self._line) + "\n")
                self._line, self._column = [], 0
            case "\r":
                self._column = 0
            case "\b":
                self._column = max(0, self._column - 1)
            case "\x1b":
                self._state = _State.ESCAPE
            case "\x9b":
                self._state, self._parameters = _State.CSI, ""
            case _ if character in _STRING_STARTS:
                self._state = _State.STRING

    def _put(self, text: str) -> None:
        self._line[self._column : self._column + len(text)] = text
        self._column += len(text)
        if len(self._line) > _LINE_CHARACTERS_MAX:
            self._done.append(self.rest())

    def _escape(self, text: str, position: int) -> int:
        found = _ESCAPE_END.search(text, position)
        if found is None:
            return len(text)
        character = found[0]
        after_intermediates = found.start() > position
        self._state = _State.TEXT
        if character == "\x1b":
            self._state = _State.ESCAPE
        elif character < " " and character not in _CANCELS:
            # A control character inside of a sequence is carried out, and the sequence goes on.
            self._control(character)
            self._state = _State.ESCAPE
        elif not after_intermediates and character == "[":
            self._state, self._parameters = _State.CSI, ""
        elif not after_intermediates and character in _STRING_STARTS:
            self._state = _State.STRING
        return found.end()

    def _csi(self, text: str, position: int) -> int:
        found = _CSI_END.search(text, position)
        end = found.start() if found else len(text)
        self._parameters = (self._parameters + text[position:end])[:_PARAMETERS_MAX]
        if found is None:
            return end
        character = found[0]
        self._state = _State.TEXT
        if character == "\x1b":
            self._state = _State.ESCAPE
        elif character < " " and character not in _CANCELS:
            self._control(character)
            self._state = _State.CSI
        elif character == "K" and self._parameters in {"", "0"}:
            del self._line[self._column :]
        return found.end()

    def _string(self, text: str, position: int) -> int:
        found = _STRING_END.search(text, position)
        if found is None:
            return len(text)
        self._state = _State.STRING_ESCAPE if found[0] == "\x1b" else _State.TEXT
        return found.end()
