"""What of a URL is a secret, and is left out wherever one is shown: in notes, errors and `repr`."""

import re
from contextlib import suppress
from typing import Final

__all__ = ["MASK", "mask_message", "masked"]

MASK: Final = "***"

# Stores quote a key that is put into a URL, so each mark may be there as it is or as `%3A`.
_COLON, _SLASH, _AT, _EQUALS = (f"(?:{mark}|%{ord(mark):02X})" for mark in ":/@=")

_USER: Final = re.compile(
    # Before a host: all up to the last @. A password may hold slashes that nobody quoted, but a port and a path are no
    # password; and one that was cut off, with the text that it was in, has no @.
    rf"""({_COLON}{_SLASH}{{2}})
    (?: [^/?\#\s'"]*{_AT}
      | [^/?\#\s'"@:]+ : (?!\d*(?:[/?\#\s'",)\]]|$)) [^\s'"@]* (?:@|$)
    )""",
    re.VERBOSE | re.IGNORECASE,
)

_PARAMETER: Final = re.compile(
    rf"""((?:%(?:3F|26|3B|23)|(?<![\w.-]))([\w.-]{{1,64}}){_EQUALS})((?:(?!%26|%3B)[^&;,\s'"()<>\[\]{{}}\\])+)""",
    re.IGNORECASE,
)

_SECRET: Final = re.compile(
    # Names of parameters: Amazon's, Google's, Azure's, Alibaba's and CloudFront's, and what others call a secret.
    r"""(.*(signature|credential|secret|password|passwd|token|access[_-]?key(_?id)?|api[_-]?key)
    | ((x-|.*[_.-])?(sig|sign|auth|authorization|oauth|pwd|pass|sas|jwt|hmac|policy|pw|session|sessionid|hdnts|hdnea))
    | (key-pair-id|.*(subscription|account|sas|private)[_-]?key)
    )""",
    re.VERBOSE | re.IGNORECASE,
)

_LONG_KEY: Final = re.compile(r"[\w-]{20,}")
"""What Google's services take as `key=`; others call the name of an object so."""


def masked(text: str) -> str:
    """`text` with `***` for the user and the password of each URL in it, and for what signs or opens one.

    What is left still tells one sample from another, as a key must in a note: hosts, paths, and other parameters.
    """
    if "=" not in text and "%3" not in text and "//" not in text:
        return text
    return _PARAMETER.sub(_without_secret, _USER.sub(_without_user, text))


def _without_user(match: re.Match[str]) -> str:
    return f"{match[1]}{MASK}@"


def _without_secret(match: re.Match[str]) -> str:
    start, name, value = match.groups()
    secret = _SECRET.fullmatch(name) or (name.lower() == "key" and _LONG_KEY.fullmatch(value))
    return f"{start}{MASK}" if secret else match[0]


_DEBUG: Final = re.compile(r'(password: Some\(")[^"]*')
"""How obstore shows a password in what it says for those who debug it."""


def mask_message(error: BaseException) -> None:
    """Mask what `error` and its causes say, in place; for those that stores raise, which name the whole URL."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        with suppress(Exception):
            link.args = tuple(
                masked(_DEBUG.sub(rf"\g<1>{MASK}", part)) if isinstance(part, str) else part for part in link.args
            )
        link = link.__cause__ or link.__context__
