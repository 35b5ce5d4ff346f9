"""Credentials are refused in settings and removed from all text that capgap prints or writes.

    settings, flags, URLs --require_no_credential--> refused; the message says where credentials belong instead
    text that leaves      --redacted--> the same with *** for each credential

Two kinds are recognised: text in the form of a credential, such as a password in a URL or a signature in its query, and
the values of environment variables of this process whose names say that they are secret.
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
"""The text that replaces a credential."""

# Shorter values are ignored, because they would be found by chance in unrelated words.
_SHORTEST_SECRET = 8
# A proxied URL may be percent-encoded several times.
_MOST_QUOTED = 3

# Every repetition is bounded, so that no untrusted text can make a search slow.
_SCHEME = r"(?<![A-Za-z0-9+.])[A-Za-z][A-Za-z0-9+.-]{0,20}:/{1,2}"
_USER = re.compile(rf"({_SCHEME})([^/?#\s\"'<>\\]{{0,512}})@")
_ODD_PASSWORD = re.compile(rf"({_SCHEME})[^/?#@:\s\"'<>\\]{{0,128}}:(?!\d{{1,5}}(?:[/?#,;\s]|$))[^\s\"'<>\\]{{0,512}}@")
# matches a setting that is a URL as a whole, so that its password may hold spaces and quotes
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
# a query parameter of any name with 32 or more letters and digits: values of such length are rarely chosen by hand
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

# In URLs of these schemes the name before the host is an Azure container or a revision, and no account.
_NAME_IS_A_PLACE = ("abfs", "abfss", "az", "wasb", "wasbs", "hf")

_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|pwd|secret|token|credentials?|authorization|jwt|"
    r"(?:api|access|secret|account|private|auth|session)[_-]?keys?|sas[_-]?token|connection[_-]?string)$",
    re.IGNORECASE,
)
# Settings of language models that end in `token` and are no secret: bytes per token, the end-of-text token and so on.
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
    """Refuse a setting that is or contains a credential.

    Args:
        name: name of the setting.
        value: the value given: text, or lists and mappings of text, searched to any depth.

    Raises:
        ValueError: a credential was found. The message names the setting and where the credential belongs, and does not
            repeat the value.
    """
    if isinstance(value, str):
        found = "a credential" if is_secret_name(name) and value else credential_in(value) or _of_environment(value)
        if found is not None:
            raise ValueError(
                f"{name}: found {found}, expected none, because settings are written into files; put it into "
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
    """Return the kind of credential that a text contains, in words; None if it contains none."""
    # normalise characters that programs read as @ or :, such as their full-width forms
    text = unicodedata.normalize("NFKC", text)
    for _ in range(_MOST_QUOTED):
        if (found := _credential_in(text)) is not None:
            return found
        if (plain := unquote(text)) == text:
            break
        text = plain
    return None


def is_secret_name(name: str) -> bool:
    """Return whether the name of a setting or argument says that it is a secret, like `api_key` or `--wandb.token`."""
    return _SECRET_NAME.search(name) is not None and _TOKEN_OF_TEXT.search(name) is None


def redacted(text: str) -> str:
    """Return the text with *** in place of everything that looks like a credential or is a secret of this process."""
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
    """Return a JSON value with all texts in it redacted, and *** in place of texts whose key names a secret."""
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
    """Redact this value from now on: it came from an environment variable whose name does not say it is secret."""
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
    """Return a description if a text contains a secret variable's value, None if not.

    Values of letters or digits alone are not searched for, because a path may contain such a word by chance.
    """
    if any(one in text and not one.isalpha() and not one.isdigit() for one in _secrets()):
        return "the value of a secret environment variable"
    return None


def _place_for(name: str, value: str) -> str:
    """Return the place where the credential of this setting belongs, in words."""
    if (section := next((one for one in ("judge", "cache.server") if name.startswith(f"{one}.")), None)) is not None:
        return f"the environment variable that {section}.api_key_env names"
    if (logger := next((one for one in _LOGGERS if one in name.lower()), None)) is not None:
        return _LOGGERS[logger]
    scheme = re.search(r"([A-Za-z][A-Za-z0-9+.]{0,20})(?:://|%3A%2F%2F)", value)
    return _ELSEWHERE if scheme is None else _BELONGS.get(scheme[1].lower(), _ELSEWHERE)


def _below(name: str, key: object, values: Mapping[Any, Any]) -> str:
    """Return the name of a nested setting; for a logger's arguments it names the logger, as `_place_for` needs it."""
    logger = str(values.get("class_path", ""))
    is_named = key == "init_args" and re.fullmatch(r"[\w.]{1,200}", logger)
    return f"{name}.{logger}.{key}" if is_named else f"{name}.{key}"


def _without_user(match: re.Match[str]) -> str:
    is_place = ":" not in match[2] and match[1].partition(":")[0].lower() in _NAME_IS_A_PLACE
    return match[0] if is_place else f"{match[1]}{REDACTED}@"


def _secrets() -> list[str]:
    """Return the secrets of the environment in all their forms, longest first, so that none is cut by a shorter one."""
    found = set(_remembered)
    for name, value in os.environ.items():
        found |= _secrets_in(name, value)
    return sorted(found, key=len, reverse=True)


@lru_cache(maxsize=4096)
def _secrets_in(name: str, value: str) -> frozenset[str]:
    """Return the secrets in an environment variable: its value, a URL's password, or texts of fsspec's settings."""
    found = {unquote(match[2].partition(":")[2]) for match in _USER.finditer(value)}
    found |= {match[2].partition(":")[2] for match in _USER.finditer(value)}
    if name.startswith("FSSPEC_"):
        found |= _words(value, is_secret_name(name))
    elif _SECRET_VARIABLE.search(name.upper()) and not _NO_SECRET_VARIABLE.search(name.upper()):
        found |= {value.strip()} if not _is_file(value) else set()
    forms = found | {quote(one, safe="") for one in found} | {json.dumps(one)[1:-1] for one in found}
    return frozenset(one for one in forms if len(one) >= _SHORTEST_SECRET)


def _words(value: str, is_secret: bool) -> set[str]:
    """Return the texts of a JSON value whose key names a secret or a header, each also as its last word alone."""
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
