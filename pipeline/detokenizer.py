"""Token ids to text, piece by piece: each as soon as no later token can change it.

Stock streamers print up to the last blank, which keeps texts without blanks back to their end, and begin anew at each
line, where a decoder may drop a blank; the tokenizers library's decoding stream ends in an error at bytes that are no
text. Owns what is certain, and when.
"""

from typing import Any

# What stands for bytes that are no character, or not yet.
INCOMPLETE = "\ufffd"


class Detokenizer:
    """One answer's text. All pieces together are ``decode`` of all its ids, without special tokens and outer blanks.

    A piece is decoded behind the tokens of the one before, since what a token gives may depend on whether it is the
    first. It is held back while it ends in a part of a character, in blanks (they may be the answer's last), or in a
    byte token of a SentencePiece vocabulary: one wrong byte spoils all of its neighbours.
    """

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer`` is transformers', a fast one."""
        self.tokenizer = tokenizer
        known = (tokenizer.backend_tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.bytes = frozenset(i for i in known if i is not None)
        self.silent = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.ids: list[int] = []
        # tokens of the piece before are [before, given), those held back follow
        self.before = self.given = 0
        self.begun = False

    def add(self, token: int) -> str:
        """The text that is certain with this token, often nothing."""
        if token in self.silent:  # bytes on either side of it are neighbours
            return ""
        self.ids.append(token)
        text = "" if token in self.bytes else self._held()
        if not text or text[-1] == INCOMPLETE or text[-1].isspace():
            return ""
        return self._give(text)

    def end(self) -> str:
        """What is left when no token follows."""
        return self._give(self._held().rstrip())

    def _held(self) -> str:
        known = self._decode(self.ids[self.before : self.given])
        return self._decode(self.ids[self.before :])[len(known) :]

    def _give(self, text: str) -> str:
        text = text if self.begun else text.lstrip()
        self.before, self.given, self.begun = self.given, len(self.ids), self.begun or bool(text)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
