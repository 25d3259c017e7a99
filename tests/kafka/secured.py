"""A Kafka broker with TLS, SASL and an authorizer, and who may do what there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from dataflows.kafka.access import Acl
from tests.kafka.cluster import KafkaCluster, _free_ports

_RESOURCES = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactional-id": ResourceType.TRANSACTIONAL_ID,
}
_OPERATIONS = {
    "Read": AclOperation.READ,
    "Write": AclOperation.WRITE,
    "Create": AclOperation.CREATE,
    "DescribeConfigs": AclOperation.DESCRIBE_CONFIGS,
}


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


def authority(directory: Path, name: str) -> Path:
    """Make a certificate authority, ``<name>.pem`` and ``<name>.key``; return its certificate."""
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    openssl(directory, "req", "-x509", *options, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    return directory / f"{name}.pem"


def certificate(
    directory: Path, ca: str, name: str, *, password: str = "", address: str = ""
) -> tuple[Path, Path]:
    """Return the certificate of `name`, signed by the authority `ca`, and its private key."""
    hidden = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    openssl(
        directory, "req", "-newkey", "rsa:2048", *hidden, "-subj", f"/CN={name}",
        "-keyout", f"{name}.key", "-out", f"{name}.csr",
    )  # fmt: skip
    sign = ["x509", "-req", "-days", "2", "-in", f"{name}.csr", "-out", f"{name}.pem"]
    sign += ["-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial"]
    if address:
        (directory / f"{name}.ext").write_text(f"subjectAltName={address}\n")
        sign += ["-extfile", f"{name}.ext"]
    openssl(directory, *sign)
    return directory / f"{name}.pem", directory / f"{name}.key"


class SecuredCluster(KafkaCluster):
    """One broker at which nobody may do anything but what `grant` allows.

    `secured_servers` takes SASL_SSL (SCRAM-SHA-512, PLAIN, OAUTHBEARER with unsigned tokens),
    `tls_servers` SSL with a client certificate. At `bootstrap_servers`, which is plain, everything
    is allowed: for the test itself. The broker's certificate is of 127.0.0.1 and no other name.

    Args:
        users: name → password, the same for SCRAM and PLAIN.
    """

    def __init__(self, users: dict[str, str]) -> None:
        plain = " ".join(f'user_{name}="{password}"' for name, password in users.items())
        module = "org.apache.kafka.common.security"
        super().__init__(
            1,
            config={
                "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT,"
                "SECURED:SASL_SSL,TLS:SSL",
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:ANONYMOUS",
                "listener.name.secured.sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN,OAUTHBEARER",
                "listener.name.secured.scram-sha-512.sasl.jaas.config": f"{module}.scram."
                "ScramLoginModule required;",
                "listener.name.secured.plain.sasl.jaas.config": f"{module}.plain."
                f"PlainLoginModule required {plain};",
                "listener.name.secured.oauthbearer.sasl.jaas.config": f"{module}.oauthbearer."
                'OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";',
                "listener.name.tls.ssl.client.auth": "required",
            },
        )
        self._users = users
        self._secured, self._tls = _free_ports(2)
        self.secured_servers = f"127.0.0.1:{self._secured}"
        self.tls_servers = f"127.0.0.1:{self._tls}"

    @property
    def ca(self) -> Path:
        """The certificate of the authority that signed the broker's."""
        return self.directory / "ca.pem"

    def _listeners(self, port: int, controller: int) -> str:
        return (
            f"{super()._listeners(port, controller)},SECURED://{self.secured_servers},"
            f"TLS://{self.tls_servers}"
        )

    def _properties(self) -> dict[str, str]:
        authority(self.directory, "ca")
        own, key = certificate(self.directory, "ca", "broker", address="IP:127.0.0.1")
        store = self.directory / "broker-store.pem"
        store.write_text(key.read_text() + own.read_text())
        return {
            **super()._properties(),
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(store),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.ca),
        }

    def __enter__(self) -> SecuredCluster:
        super().__enter__()
        admin = self._admin()
        scram = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        changes = [
            UserScramCredentialUpsertion(name, scram, password.encode())
            for name, password in self._users.items()
        ]
        for done in admin.alter_user_scram_credentials(changes).values():
            done.result(30)
        return self

    def grant(self, principal: str, acls: Iterable[Acl]) -> None:
        """Allow a principal (``User:name``) these things; it counts some milliseconds later."""
        admin = AdminClient(self._client_config)
        for done in admin.create_acls([_binding(principal, acl) for acl in acls]).values():
            done.result(30)

    def revoke(self, principal: str, acls: Iterable[Acl]) -> None:
        """Undo `grant` of these things."""
        admin = AdminClient(self._client_config)
        filters = [
            AclBindingFilter(
                each.restype, each.name, each.resource_pattern_type, each.principal, each.host,
                each.operation, each.permission_type,
            )
            for each in (_binding(principal, acl) for acl in acls)
        ]  # fmt: skip
        for done in admin.delete_acls(filters).values():
            assert done.result(30), "nothing was revoked"


def _binding(principal: str, acl: Acl) -> AclBinding:
    return AclBinding(
        _RESOURCES[acl.resource],
        acl.name,
        ResourcePatternType.PREFIXED if acl.prefixed else ResourcePatternType.LITERAL,
        principal,
        "*",
        _OPERATIONS[acl.operation],
        AclPermissionType.ALLOW,
    )
