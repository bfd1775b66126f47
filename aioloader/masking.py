"""Hides the secrets in URLs wherever these are shown: in notes, errors and `repr`."""

import re
from contextlib import suppress
from typing import Final

__all__ = ["MASK", "mask_message", "masked"]

MASK: Final = "***"

# Stores quote keys in URLs, so each mark may occur as it is or quoted, as `%3A`.
_COLON, _SLASH, _AT, _EQUALS = (f"(?:{mark}|%{ord(mark):02X})" for mark in ":/@=")

_USER: Final = re.compile(
    # Before a host: everything up to the last @. A password may have unquoted slashes, but a port and a path are not a
    # password. A password in a text that was cut off may have no @ after it.
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
    # Names of parameters: Amazon's, Google's, Azure's, Alibaba's and CloudFront's, and other usual ones.
    r"""(.*(signature|credential|secret|password|passwd|token|access[_-]?key(_?id)?|api[_-]?key)
    | ((x-|.*[_.-])?(sig|sign|auth|authorization|oauth|pwd|pass|sas|jwt|hmac|policy|pw|session|sessionid|hdnts|hdnea))
    | (key-pair-id|.*(subscription|account|sas|private)[_-]?key)
    )""",
    re.VERBOSE | re.IGNORECASE,
)

_LONG_KEY: Final = re.compile(r"[\w-]{20,}")
"""The value of `key=` in Google's services. For others, `key` is the name of an object."""


def masked(text: str) -> str:
    """`text` with `***` for the user and the password of each URL in it, and for signatures, tokens and the like.

    Hosts, paths and other parameters are kept, so that keys in notes still identify samples.
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
"""How obstore shows a password in debug output."""


def mask_message(error: BaseException) -> None:
    """Mask the messages of `error` and its causes in place. Errors of stores contain the whole URL."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        with suppress(Exception):
            link.args = tuple(
                masked(_DEBUG.sub(rf"\g<1>{MASK}", part)) if isinstance(part, str) else part for part in link.args
            )
        link = link.__cause__ or link.__context__
