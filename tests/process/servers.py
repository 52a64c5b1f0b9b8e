"""A SuperLink and SuperNodes that are ended and started again one by one, with or without certificates."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lifl.deployment import Deployment
from lifl.programs import HOST, Programs, free_ports, is_listening

PLAIN = serialization.NoEncryption()
PEM = serialization.Encoding.PEM


class Servers(Deployment):
    """`with Servers() as servers: servers.start_node(0)`.

    `arguments` go to the server, the first of `command`. With `is_secure` it has a certificate and lets in only
    SuperNodes whose keys are registered, which :meth:`start_node` does.
    """

    def __init__(
        self,
        command: Sequence[str] = ("lifl-superlink",),
        arguments: Sequence[str] = (),
        *,
        is_secure: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(supernodes=2, server_command=command, env=env)
        self._arguments, self._is_secure = list(arguments), is_secure
        self._started: list[str] = []

    @property
    def server(self) -> str:
        """The name of the server that was started last."""
        return [name for name in self._started if name.startswith("server")][-1]

    @property
    def database(self) -> Path:
        """For ``--database``."""
        return self.folder / "state.db"

    def start_server(self, *arguments: str) -> None:
        """Starts it, on the same port each time, with `arguments` too, and waits until it listens."""
        command = [*self._server_command, "--disable-runtime-dependency-installation", "--port", str(self._ports[0])]
        command += [argument.format(database=self.database) for argument in (*self._arguments, *arguments)]
        if self._is_secure:
            files = ("--ssl-ca-certfile", "ca.pem"), ("--ssl-certfile", "server.pem"), ("--ssl-keyfile", "server.key")
            command += [
                "--enable-supernode-auth",
                *(part for flag, f in files for part in (flag, str(self.folder / f))),
            ]
        else:
            command.append("--insecure")
        name = self._launch("server", command, self._home("superlink"))
        self.wait_until(lambda: is_listening(self._ports[0]), "the server did not start to listen", name)

    def start_superexec(self) -> None:
        """What starts ServerApps, for a server with ``--isolation process``."""
        how = ["--root-certificates", str(self.folder / "ca.pem")] if self._is_secure else ["--insecure"]
        command = ["flower-superexec", *how, "--runtime-api-address", self.address]
        self._launch("superexec", command, self._home("superexec"))

    def start_node(self, index: int, env: Mapping[str, str] | None = None) -> str:
        """Starts SuperNode `index` and waits until it is registered; its name."""
        command = ["flower-supernode", "--superlink", self.address, "--port", str(self._ports[1 + index])]
        command += ["--node-config", f"partition-id={index} num-partitions={self._supernodes}"]
        if self._is_secure:
            key = self.folder / f"node-{index}"
            if not key.exists():
                make_key(key)
                self._flwr("supernode", "register", f"{key}.pub")
            command += ["--root-certificates", str(self.folder / "ca.pem"), "--auth-supernode-private-key", str(key)]
        else:
            command.append("--insecure")
        name = self._launch(f"supernode-{index}", command, self._home(f"supernode-{index}") | dict(env or {}))
        self.wait_until(lambda: self._has_registered(name), f"SuperNode {index} did not register", name)
        return name

    def node(self, index: int) -> str:
        """The name of a SuperNode that was started last."""
        return [name for name in self._started if name.startswith(f"supernode-{index}-")][-1]

    def submit(self, app: Path, config: Mapping[str, str | int | float | bool]) -> None:
        """Starts a run and does not wait for it."""
        path = self.folder / "run.toml"
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
        self._flwr("run", str(app), "--run-config", str(path))

    def run_status(self) -> str:
        """Of the newest run."""
        run = self._runs()[0]
        return f"{run['status']}: {run['status-details']}"

    def wait_for_run(self) -> None:
        """Until the newest run has ended well."""
        name = self.server
        self.wait_until(lambda: not self.run_status().startswith(("pending", "running", "starting")), "no end", name)
        assert self.run_status().startswith("finished:completed"), f"{self.run_status()}\n{self.tail(name)}"

    def end(self, name: str, how: signal.Signals) -> int:
        """Ends a program with a signal; its exit status, once it has gone."""
        program = self._programs.pop(name)
        program.send_signal(how)
        return program.wait(30)

    def execute(self, statement: str) -> None:
        """Changes the database."""
        connection = sqlite3.connect(self.database, timeout=30)
        with connection:
            connection.execute(statement)
        connection.close()

    def _launch(self, kind: str, command: Sequence[str], env: Mapping[str, str]) -> str:
        name = f"{kind}-{len(self._started)}"
        self._started.append(name)
        self.launch(name, command, env, is_passing=True)
        return name

    def _start(self) -> None:
        Programs._start(self)
        self._ports = free_ports(1 + self._supernodes)
        self.address = f"{HOST}:{self._ports[0]}"
        (self.folder / "cli").mkdir()
        if self._is_secure:
            make_certificates(self.folder)
        how = f'root-certificates = "{self.folder}/ca.pem"' if self._is_secure else "insecure = true"
        (self.folder / "cli" / "config.toml").write_text(
            f'[superlink]\ndefault = "lifl"\n[superlink.lifl]\naddress = "{self.address}"\n{how}\n'
        )
        self.start_server()


def make_key(path: Path) -> None:
    """A SuperNode's key pair, as `ssh-keygen -t ecdsa -b 384` makes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, PLAIN))
    ssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(*ssh))


def make_certificates(folder: Path) -> None:
    """ca.pem, and server.pem with server.key that it has signed."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("lifl's tests", HOST)]
    now = datetime.datetime.now(datetime.UTC)
    for i, file in enumerate(("ca.pem", "server.pem")):
        made = x509.CertificateBuilder(names[0], names[i], keys[i].public_key(), x509.random_serial_number())
        made = made.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
            now + datetime.timedelta(days=1)
        )
        made = made.add_extension(x509.BasicConstraints(ca=i == 0, path_length=None), critical=True)
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[i].public_key()), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
        made = made.add_extension(authority, critical=False)
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
        made = made.add_extension(address, critical=False)
        (folder / file).write_bytes(made.sign(keys[0], hashes.SHA256()).public_bytes(PEM))
    private = serialization.PrivateFormat.PKCS8
    (folder / "server.key").write_bytes(keys[1].private_bytes(PEM, private, PLAIN))
    os.chmod(folder / "server.key", 0o600)
