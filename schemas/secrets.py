"""What looks like a credential: refused where a setting is read, and taken out of everything that is said or written.

    settings, flags, URLs --require_no_credential--> refused; the message says where credentials belong instead
    text that leaves      --redacted--> the same with *** for each credential

Two kinds are known: what has a credential's form, such as a password in a URL or a signature in its query, and the
values of this process's environment variables whose names say that they are secret.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

REDACTED = "***"
"""Stands where a credential stood."""

# A shorter value would be found in words that have nothing to do with it.
_SHORTEST_SECRET = 8
# A proxied URL may be quoted several times over.
_MOST_QUOTED = 3

# Every repetition is bounded, so that no text of a stranger's makes a search take long.
_SCHEME = r"(?<![A-Za-z0-9+.])[A-Za-z][A-Za-z0-9+.-]{0,20}:/{1,2}"
_USER = re.compile(rf"({_SCHEME})([^/?#\s\"'<>\\]{{0,512}})@")
_ODD_PASSWORD = re.compile(rf"({_SCHEME})[^/?#@:\s\"'<>\\]{{0,128}}:(?!\d{{1,5}}(?:[/?#,;\s]|$))[^\s\"'<>\\]{{0,512}}@")
# the whole setting is the URL, so that its password may hold blanks and quotes
_WHOLE = re.compile(r"\s{0,8}(?:[A-Za-z][A-Za-z0-9+.-]{0,20}:)?/{1,2}([^/?#]{0,512})@")
_RELATIVE = re.compile(r"(?<![\w:/.%])//[^/?#@:\s\"'<>\\]{0,128}:[^\s\"'<>\\@/]{1,512}@")
_BARE_USER = re.compile(r"(?<![\w/@.:%-])[\w.+%-]{1,128}:[^\s/@:\"'<>\\]{2,256}@(?!sha256)(?=[\w.-])")
_QUOTED_USER = re.compile(r"(%(?:25)*3A(?:%(?:25)*2F){2})[^\s\"'&/\\]{0,512}?(%(?:25)*40)", re.IGNORECASE)

_STRONG = (
    r"sig|signature|token|secret|passw(?:or)?d|passphrase|pwd|api[_-]?key|access[_-]?key(?:[_-]?id)?|secret[_-]?key|"
    r"account[_-]?key|private[_-]?key|auth|authorization|credentials?|jwt|awsaccesskeyid"
)
_NAME = rf"(?<![\w.-])(?:[\w.-]{{0,40}}?(?:{_STRONG}))"
_PARAMETER = (
    rf"(?:[\w.-]{{0,40}}?(?:{_STRONG})|(?:[\w.-]{{0,40}}?[_.-])?key|key-pair-id|code|pass|policy|"
    r"j?session(?:[_-]?id)?|sid|ticket|hmac|sign|"
    r"x-(?:amz|goog)-[\w-]{1,40}|googleaccessid)"
)
_QUERY = re.compile(rf"([?&;#]{_PARAMETER}=)[^&#;\s\"'<>\\]{{1,4096}}", re.IGNORECASE)
# whatever it is called: nobody chooses so long a value of letters and digits by hand
_RANDOM = re.compile(
    r"([?&][\w.-]{1,60}=)(?=[^&#\s\"'<>\\]{0,64}\d)(?=[^&#\s\"'<>\\]{0,64}[A-Za-z])[A-Za-z0-9%+/=_~.-]{32,4096}"
)
_QUOTED_QUERY = re.compile(
    rf"(%(?:25)*(?:3F|26|3B){_PARAMETER}%(?:25)*3D)(?:[^&\s\"'<>%\\]|%(?!(?:25)*26)){{1,4096}}", re.IGNORECASE
)
_ASSIGNED = re.compile(rf"({_NAME}=)(?!=|None\b|True\b|False\b|\*\*\*)[^\s&\"',;()\[\]{{}}\\]{{4,4096}}", re.IGNORECASE)
_QUOTED_ASSIGNED = re.compile(
    rf"(\\{{0,4}}[\"']{_NAME}\\{{0,4}}[\"']\s{{0,8}}[:=]\s{{0,8}}\\{{0,4}}[\"'])[^\"'\\\n]{{1,4096}}", re.IGNORECASE
)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|x-api-key|x-auth-token|(?:set-)?cookie)(\s{0,4}:\s{0,4})(?![\"'\\])"
    r"[^\n,;\"'\\{}<>]{1,4096}",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b((?i:bearer)\s{1,4}|Basic\s{1,4}(?=[A-Za-z+/]{0,200}[0-9=]))[A-Za-z0-9._~+/=-]{8,4096}")
_KEY_FORMS = re.compile(
    r"(?<![\w-])(?:sk-(?=[A-Za-z_-]{0,64}\d)[A-Za-z0-9_-]{16,256}|hf_[A-Za-z0-9]{20,256}|gh[pousr]_[A-Za-z0-9]{20,256}|"
    r"github_pat_\w{20,256}|glpat-[\w-]{20,256}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,256}|"
    r"eyJ[\w-]{10,4096}\.[\w-]{10,4096}\.[\w-]{0,4096})(?![\w-])"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]{0,16384}(?:-----END [A-Z ]{0,40}PRIVATE KEY-----)?"
)

# Of these URLs the name before the host is no account: a container of Azure's, a revision.
_NAME_IS_A_PLACE = ("abfs", "abfss", "az", "wasb", "wasbs", "hf")

_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|pwd|secret|token|credentials?|authorization|jwt|"
    r"(?:api|access|secret|account|private|auth|session)[_-]?keys?|sas[_-]?token|connection[_-]?string)$",
    re.IGNORECASE,
)
# Of language models: bytes per token, the end-of-text token and their like.
_TOKEN_OF_TEXT = re.compile(r"(?:^|[_.-])(?:per|bos|eos|pad|unk|sep|mask|stop|new|next|text)[_-]token$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:KEY|KEYS|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PWD|PASS|CREDENTIALS?|AUTH|JWT|COOKIE|"
    r"CONNECTION_STRING|KEY_ID)(?:_|$)"
)
_NO_SECRET_VARIABLE = re.compile(r"^(?:PWD|OLDPWD)$|(?:_FILE|_PATH|_DIR|_SOCK|_ENV|_NAME|_URL|_HOST|_METHOD|_TTL)$")

_FOR_WEB = (
    'the environment variable FSSPEC_HTTPS (FSSPEC_HTTP), as in {"headers": {"Authorization": ...}}, or ~/.netrc with '
    'FSSPEC_HTTPS={"client_kwargs": {"trust_env": true}}'
)
_BELONGS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "gs": "the file that GOOGLE_APPLICATION_CREDENTIALS names",
    "az": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
    "http": _FOR_WEB,
}
_BELONGS |= {"s3a": _BELONGS["s3"], "gcs": _BELONGS["gs"], "abfs": _BELONGS["az"], "abfss": _BELONGS["az"]}
_BELONGS |= {"https": _FOR_WEB}
_LOGGERS = {
    "wandb": "WANDB_API_KEY, or ~/.netrc",
    "mlflow": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "comet": "COMET_API_KEY",
    "neptune": "NEPTUNE_API_TOKEN",
}
_ELSEWHERE = (
    "an environment variable or credential file that its client reads (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "~/.aws/credentials, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, WANDB_API_KEY, MLFLOW_TRACKING_TOKEN, ~/.netrc)"
)

_OF_A_USER = "more than an address: a name or a password before the host"

_remembered: set[str] = set()


def require_no_credential(name: str, value: object) -> None:
    """Refuse a setting that holds a credential, or in which one lies at any depth.

    Args:
        name: of the setting.
        value: as it was given: text, or lists and mappings of it.

    Raises:
        ValueError: it does. The message names the setting and where its credential belongs, and repeats nothing.
    """
    if isinstance(value, str):
        found = "a credential" if is_secret_name(name) and value else credential_in(value) or _of_environment(value)
        if found is not None:
            raise ValueError(
                f"{name}: found {found}, expected none, for settings are written down; put it into "
                f"{_place_for(name, value)}"
            )
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if isinstance(key, str) and credential_in(key) is not None:
                raise ValueError(f"{name}: found a name that holds a credential, expected none")
            require_no_credential(_below(name, key, value), one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            require_no_credential(name, one)


def credential_in(text: str) -> str | None:
    """What kind of credential stands in a text, in words; None where there is none."""
    # other signs than @ and : that are read as those
    text = unicodedata.normalize("NFKC", text)
    for _ in range(_MOST_QUOTED):
        if (found := _credential_in(text)) is not None:
            return found
        if (plain := unquote(text)) == text:
            break
        text = plain
    return None


def is_secret_name(name: str) -> bool:
    """Whether a setting or argument of that name would be a secret, as `api_key` or `--wandb.token`."""
    return _SECRET_NAME.search(name) is not None and _TOKEN_OF_TEXT.search(name) is None


def redacted(text: str) -> str:
    """The text with *** for everything in it that looks like a credential, or is one of this process's."""
    for secret in _secrets():
        if secret in text:
            text = text.replace(secret, REDACTED)
    if "@" in text:
        text = _USER.sub(_without_user, text)
        text = _ODD_PASSWORD.sub(rf"\1{REDACTED}@", text)
        text = _RELATIVE.sub(f"//{REDACTED}@", text)
        text = _BARE_USER.sub(f"{REDACTED}@", text)
    if "%" in text:
        text = _QUOTED_USER.sub(rf"\1{REDACTED}\2", text)
        text = _QUOTED_QUERY.sub(rf"\1{REDACTED}", text)
    if "=" in text:
        for pattern in (_QUERY, _RANDOM, _ASSIGNED):
            text = pattern.sub(rf"\1{REDACTED}", text)
    text = _QUOTED_ASSIGNED.sub(rf"\1{REDACTED}", text)
    text = _HEADER.sub(rf"\1\2{REDACTED}", text)
    text = _BEARER.sub(rf"\1{REDACTED}", text)
    return _PRIVATE_KEY.sub(REDACTED, _KEY_FORMS.sub(REDACTED, text))


def redacted_values(value: Any) -> Any:
    """A plain JSON value with every text in it redacted, and what stands under a secret's name."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {
            redacted(key) if isinstance(key, str) else key: REDACTED
            if isinstance(one, str) and one and isinstance(key, str) and is_secret_name(key)
            else redacted_values(one)
            for key, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted_values(one) for one in value]
    return value


def remember_secret(value: str) -> None:
    """Redact this value too from here on, for it came from a variable whose name does not tell."""
    if len(value) >= _SHORTEST_SECRET:
        _remembered.add(value)


def _credential_in(text: str) -> str | None:
    for match in _USER.finditer(text):
        if ":" in match[2] or match[1].partition(":")[0].lower() not in _NAME_IS_A_PLACE:
            return _OF_A_USER
    if (whole := _WHOLE.match(text)) is not None and ":" in whole[1]:
        return _OF_A_USER
    if _ODD_PASSWORD.search(text) or _BARE_USER.search(text):
        return _OF_A_USER
    if ("://" in text and _RANDOM.search(text)) or _QUERY.search(text):
        return "more than an address: a signature or a key in its query"
    if _KEY_FORMS.search(text) or _BEARER.search(text) or _PRIVATE_KEY.search(text):
        return "what looks like a key"
    return None


def _of_environment(text: str) -> str | None:
    """Whether a setting repeats what a secret variable holds; a plain word may stand in a path by chance."""
    if any(one in text and not one.isalpha() and not one.isdigit() for one in _secrets()):
        return "the value of a secret environment variable"
    return None


def _place_for(name: str, value: str) -> str:
    """Where the credential of such a setting belongs."""
    if (section := next((one for one in ("judge", "cache.server") if name.startswith(f"{one}.")), None)) is not None:
        return f"the environment variable that {section}.api_key_env names"
    if (logger := next((one for one in _LOGGERS if one in name.lower()), None)) is not None:
        return _LOGGERS[logger]
    scheme = re.search(r"([A-Za-z][A-Za-z0-9+.]{0,20})(?:://|%3A%2F%2F)", value)
    return _ELSEWHERE if scheme is None else _BELONGS.get(scheme[1].lower(), _ELSEWHERE)


def _below(name: str, key: object, values: Mapping[Any, Any]) -> str:
    """A setting's name; of a logger's arguments with the logger, which tells where its key belongs."""
    logger = str(values.get("class_path", ""))
    is_named = key == "init_args" and re.fullmatch(r"[\w.]{1,200}", logger)
    return f"{name}.{logger}.{key}" if is_named else f"{name}.{key}"


def _without_user(match: re.Match[str]) -> str:
    is_place = ":" not in match[2] and match[1].partition(":")[0].lower() in _NAME_IS_A_PLACE
    return match[0] if is_place else f"{match[1]}{REDACTED}@"


def _secrets() -> list[str]:
    """Every form of the environment's secrets, the longest first, so that none is found within another."""
    found = set(_remembered)
    for name, value in os.environ.items():
        found |= _secrets_in(name, value)
    return sorted(found, key=len, reverse=True)


@lru_cache(maxsize=4096)
def _secrets_in(name: str, value: str) -> frozenset[str]:
    """What is secret in a variable: its value, a password in its URL, every text of fsspec's settings."""
    found = {unquote(match[2].partition(":")[2]) for match in _USER.finditer(value)}
    found |= {match[2].partition(":")[2] for match in _USER.finditer(value)}
    if name.startswith("FSSPEC_"):
        found |= _words(value, is_secret_name(name))
    elif _SECRET_VARIABLE.search(name.upper()) and not _NO_SECRET_VARIABLE.search(name.upper()):
        found |= {value.strip()} if not _is_file(value) else set()
    forms = found | {quote(one, safe="") for one in found} | {json.dumps(one)[1:-1] for one in found}
    return frozenset(one for one in forms if len(one) >= _SHORTEST_SECRET)


def _words(value: str, is_secret: bool) -> set[str]:
    """What of a JSON value stands under the name of a secret or a header, and its last word."""
    try:
        settings = json.loads(value)
    except ValueError:
        return {value} if is_secret else set()
    found: set[str] = set()
    todo = [("", settings, is_secret)]
    while todo:
        name, one, secret = todo.pop()
        secret = secret or is_secret_name(name) or name.lower() in ("headers", "key", "auth", "cookies")
        if isinstance(one, dict):
            todo += [(str(key), inner, secret) for key, inner in one.items()]
        elif isinstance(one, list):
            todo += [(name, inner, secret) for inner in one]
        elif isinstance(one, str) and secret:
            found |= {one, one.split(" ")[-1]}
    return found


def _is_file(value: str) -> bool:
    return value.startswith(("/", "~", "./")) and os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111
