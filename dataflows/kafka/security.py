"""Who the flow is to the brokers: the TLS and SASL settings, shared or of one role.

Each setting is librdkafka's, with ``KAFKA_`` before it: ``sasl.username`` is KAFKA_SASL_USERNAME. A
role's own goes over it: KAFKA_SINK_SASL_USERNAME. The roles: the *source* reads events, the *sink*
writes what the flow says (and reads it back, exactly once), the *admin* asks for topic settings and
creates topics.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, SecretStr

Role: TypeAlias = Literal["source", "sink", "admin"]
ROLES: tuple[Role, ...] = ("source", "sink", "admin")

_Protocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
_Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]
#: librdkafka's name with underscores → type and meaning. Unset by default, all of them.
SETTINGS: Mapping[str, tuple[Any, str]] = {
    "security_protocol": (_Protocol, "How brokers are spoken to; librdkafka: PLAINTEXT"),
    "ssl_ca_location": (Path, "CA certificates (PEM) that brokers must be signed by; the system's"),
    "ssl_certificate_location": (Path, "Client certificate (PEM), where brokers ask for one"),
    "ssl_key_location": (Path, "Private key (PEM) of the client certificate"),
    "ssl_key_password": (SecretStr, "Password of the private key; never printed"),
    "sasl_mechanism": (_Mechanism, "How the flow proves who it is, under SASL_…"),
    "sasl_username": (str, "User name, for PLAIN and SCRAM"),
    "sasl_password": (SecretStr, "Password, for PLAIN and SCRAM; never printed"),
    "sasl_oauthbearer_token_endpoint_url": (
        str,
        "Where tokens come from (OIDC client credentials)",
    ),
    "sasl_oauthbearer_client_id": (str, "Client id at the token endpoint"),
    "sasl_oauthbearer_client_secret": (SecretStr, "Client secret there; never printed"),
    "sasl_oauthbearer_scope": (str, "Scope asked for there, if it wants one"),
}
_FILES = ("ssl_ca_location", "ssl_certificate_location", "ssl_key_location")
_BY_PASSWORD = ("sasl_username", "sasl_password")
_PASSWORD_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_BY_TOKEN = (
    "sasl_oauthbearer_token_endpoint_url",
    "sasl_oauthbearer_client_id",
    "sasl_oauthbearer_client_secret",
)
#: librdkafka settings that bring tokens in other ways than ours.
_OTHER_TOKENS = ("sasl.oauthbearer.config", "enable.sasl.oauthbearer.unsecure.jwt")
_PREFIXES = ("security.", "ssl.", "enable.ssl.", "sasl.", "enable.sasl.", "https.")


class SecurityError(ValueError):
    """The security settings contradict each other, or name what is not there."""


def fields() -> dict[str, Any]:
    """Return the fields of a settings model: ``kafka_…``, and ``kafka_<role>_…`` for each role."""
    return {
        field(name, role): (kind | None, Field(None, description=meaning))
        for role in (None, *ROLES)
        for name, (kind, meaning) in SETTINGS.items()
    }


def field(name: str, role: Role | None = None) -> str:
    """Return the name of a field.

    >>> field("sasl_username"), field("sasl_username", "sink")
    ('kafka_sasl_username', 'kafka_sink_sasl_username')
    """
    return f"kafka_{name}" if role is None else f"kafka_{role}_{name}"


def variables(names: str, role: Role | None = None) -> str:
    """Return what to look at, as an error says it, for settings separated by blanks.

    >>> variables("ssl_ca_location")
    'KAFKA_SSL_CA_LOCATION'
    >>> variables("sasl_username sasl_password", "admin")
    'KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD (for the admin alone: KAFKA_ADMIN_…)'
    """
    *first, last = (field(name).upper() for name in names.split())
    named = f"{', '.join(first)} and {last}" if first else last
    return named if role is None else f"{named} (for the {role} alone: KAFKA_{role.upper()}_…)"


def client_settings(given: Any, role: Role, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return librdkafka's settings of one role: `options`, and over them what the fields say.

    Args:
        given: an object with the fields of `fields`.
        role: whose.
        options: librdkafka settings that were given as such.

    Raises SecurityError, naming the variable, for what is missing, contradictory or not there; no
    secret is in it.
    """
    values: dict[str, Any] = {}
    named: dict[str, str] = {}  # setting → the variable it came from
    for name in SETTINGS:
        for which in (role, None):
            value = getattr(given, field(name, which))
            if value is not None:
                values[name] = value.get_secret_value() if isinstance(value, SecretStr) else value
                named[name] = field(name, which).upper()
                break
    for name in _FILES:
        if name in values and not os.access(values[name], os.R_OK):
            raise SecurityError(
                f"{named[name]}={values[name]}: there is no such file, or it may not be read"
            )
    protocol = str(values.get("security_protocol", options.get("security.protocol", "")))
    if not protocol and values:
        raise SecurityError(
            f"{next(iter(named.values()))} is set, but no protocol that uses it: set "
            f"{variables('security_protocol', role)} to SSL or SASL_SSL"
        )
    sasl, tls = protocol.upper().startswith("SASL_"), protocol.upper().endswith("SSL")
    mechanism = values.get("sasl_mechanism") or options.get(
        "sasl.mechanism", options.get("sasl.mechanisms")
    )
    tokens = mechanism == "OAUTHBEARER"
    wanted: dict[str, str] = {}  # setting → what needs it
    if sasl and mechanism is None:
        wanted["sasl_mechanism"] = protocol
    elif tokens and not any(name in options for name in _OTHER_TOKENS):
        wanted |= dict.fromkeys(_BY_TOKEN, "OAUTHBEARER")
    elif sasl and mechanism in _PASSWORD_MECHANISMS:
        wanted |= dict.fromkeys(_BY_PASSWORD, str(mechanism))
    if tls and "ssl_certificate_location" in values:
        wanted["ssl_key_location"] = named["ssl_certificate_location"]
    for name, by in wanted.items():
        if name not in values and _property(name) not in options:
            raise SecurityError(f"{variables(name, role)} is not set: {by} needs it")
    used = {
        _property(name): str(value)
        for name, value in values.items()
        if (tls or not name.startswith("ssl_"))
        and (sasl or not name.startswith("sasl_"))
        and (tokens or not name.startswith("sasl_oauthbearer_"))
        and (not tokens or name not in _BY_PASSWORD)
    }
    if "sasl.oauthbearer.token.endpoint.url" in used:
        used["sasl.oauthbearer.method"] = "oidc"
    if "sasl.mechanism" in used:  # one thing by two names
        options = {name: value for name, value in options.items() if name != "sasl.mechanisms"}
    return {**options, **used}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a client's librdkafka settings that say who it is, and how it speaks."""
    return {name: value for name, value in config.items() if name.startswith(_PREFIXES)}


def _property(name: str) -> str:
    return name.replace("_", ".")
