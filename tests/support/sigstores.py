"""A sigstore on loopback: accounts, a certificate authority, a certificate log and a signature log.

It speaks the HTTP APIs of Fulcio (v2), Rekor (v1), an OpenID provider and GitHub's endpoint for
tokens of jobs, and does what they do: tokens are verified before a certificate is issued, and
signatures before they are logged; certificates have a signed timestamp of the certificate log
(RFC 6962, precertificates), and entries an inclusion proof, a checkpoint and a signed time. Its
keys are at hand, for tests of what a thief of them can do.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import http.server
import json
import secrets
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import jwt
import rfc8785
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from composable.packaging.trust.identities import IdentityKey

MINUTES: Final = datetime.timedelta(minutes=1)
_ECDSA: Final = ec.ECDSA(hashes.SHA256())
_SCT_LIST: Final = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_ISSUER: Final = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_ISSUER_V2: Final = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
_TOKEN_MINUTES: Final = 10


@dataclass(frozen=True)
class Account:
    """An account of the provider.

    Args:
        issuer: The provider's URL.
        subject: An e-mail address, or the URL of a workflow.
    """

    issuer: str
    subject: str

    @property
    def key(self) -> IdentityKey:
        """The account as a grant names it."""
        return IdentityKey.of(self.issuer, self.subject)

    @property
    def text(self) -> str:
        """The same as text."""
        return f"sigstore:{self.issuer}#{self.subject}"


@dataclass
class LocalSigstore:
    """The keys and the log of one sigstore.

    Args:
        url: The URL of its services.
        offset: How far its clock is from that of this machine.
        down: Services that answer 503: `fulcio`, `rekor` or `token`.
    """

    url: str
    offset: datetime.timedelta = datetime.timedelta()
    down: set[str] = field(default_factory=set)
    entries: list[bytes] = field(default_factory=list)
    certificates: list[x509.Certificate] = field(default_factory=list)
    person: str = "alice@example.org"

    def __post_init__(self) -> None:
        self.token_key, self.ct_key, self.log_key, self.root_key, self.ca_key = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(5)
        )
        self.root = self._make_authority("root", self.root_key, None)
        self.ca = self._make_authority("intermediate", self.ca_key, self.root)
        self._codes: dict[str, dict[str, str]] = {}
        self._guard = threading.Lock()

    # What it is known by.

    def now(self) -> datetime.datetime:
        """Return its time."""
        return datetime.datetime.now(datetime.UTC) + self.offset

    def account(self, subject: str) -> Account:
        """Return the account of a person, or of a workflow by its URL."""
        kind = "actions" if subject.startswith("https://") else "people"
        return Account(f"{self.url}/{kind}", subject)

    def config(self) -> dict[str, Any]:
        """Return its client trust configuration."""
        return {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": self.trusted_root(),
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [self._service("fulcio")],
                "oidcUrls": [self._service("people")],
                "rekorTlogUrls": [self._service("rekor")],
                "rekorTlogConfig": {"selector": "ANY"},
            },
        }

    def trusted_root(self) -> dict[str, Any]:
        """Return its certificates and keys."""
        start = {"start": "2020-01-01T00:00:00Z"}
        chain = [{"rawBytes": _encode(_to_der(each))} for each in (self.ca, self.root)]
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [self._log_instance("rekor", self.log_key)],
            "certificateAuthorities": [
                {
                    "subject": {"organization": "lab", "commonName": "sigstore"},
                    "uri": f"{self.url}/fulcio",
                    "certChain": {"certificates": chain},
                    "validFor": start,
                }
            ],
            "ctlogs": [self._log_instance("ct", self.ct_key)],
        }

    def _service(self, name: str) -> dict[str, Any]:
        # Fulcio's client replaces the path of its URL.
        url = self.url if name == "fulcio" else f"{self.url}/{name}"
        start = {"start": "2020-01-01T00:00:00Z"}
        return {"url": url, "majorApiVersion": 1, "validFor": start, "operator": "lab"}

    def _log_instance(self, name: str, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
        return {
            "baseUrl": f"{self.url}/{name}",
            "hashAlgorithm": "SHA2_256",
            "publicKey": {
                "rawBytes": _encode(_spki(key)),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": {"start": "2020-01-01T00:00:00Z"},
            },
            "logId": {"keyId": _encode(_key_id(key))},
        }

    # Accounts.

    def make_token(self, account: Account) -> str:
        """Return a token that an account has from the provider."""
        now = int(self.now().timestamp())
        claims = {
            "iss": account.issuer,
            "sub": account.subject,
            "aud": "sigstore",
            "iat": now,
            "exp": now + 60 * _TOKEN_MINUTES,
        }
        if account.issuer.endswith("/actions"):
            # As GitHub's: the subject is the repository, and the workflow another claim.
            claims["sub"] = "repo:alice/german:ref:refs/heads/main"
            claims["job_workflow_ref"] = account.subject.removeprefix("https://github.com/")
        return jwt.encode(claims, self.token_key, algorithm="ES256")

    def read_token(self, token: str) -> Account:
        """Verify a token, and return whose it is.

        Raises:
            jwt.PyJWTError: When it is not valid.
        """
        claims = jwt.decode(
            token, self.token_key.public_key(), algorithms=["ES256"], audience="sigstore"
        )
        workflow = claims.get("job_workflow_ref")
        subject = f"https://github.com/{workflow}" if workflow else claims["sub"]
        return Account(claims["iss"], subject)

    # The certificate authority, and the log of its certificates.

    def certify(
        self,
        account: Account,
        key: ec.EllipticCurvePublicKey,
        *,
        ct_key: ec.EllipticCurvePrivateKey | None = None,
        is_logged: bool = True,
    ) -> x509.Certificate:
        """Return a certificate for the key of an account, valid for ten minutes.

        Args:
            account: The account.
            key: The public key.
            ct_key: Another key than that of the certificate log.
            is_logged: Whether it has a timestamp of the certificate log.
        """
        now = self.now().replace(microsecond=0)
        name: x509.GeneralName = x509.UniformResourceIdentifier(account.subject)
        if "@" in account.subject and not account.subject.startswith("https://"):
            name = x509.RFC822Name(account.subject)
        unrecognized = x509.UnrecognizedExtension
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.ca.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + 10 * MINUTES)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca_key.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(unrecognized(_ISSUER, account.issuer.encode()), critical=False)
            .add_extension(
                unrecognized(_ISSUER_V2, asn1.encode_der(account.issuer)), critical=False
            )
        )
        certificate = builder.sign(self.ca_key, hashes.SHA256())
        if is_logged:
            stamp = self._stamp_certificate(certificate, ct_key or self.ct_key)
            builder = builder.add_extension(unrecognized(_SCT_LIST, stamp), critical=False)
            certificate = builder.sign(self.ca_key, hashes.SHA256())
        self.certificates.append(certificate)
        return certificate

    def _stamp_certificate(
        self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> bytes:
        """Return the list with a signed timestamp on a certificate without it (RFC 6962, 3.2)."""
        moment = int(self.now().timestamp() * 1000)
        issuer = hashlib.sha256(_spki(self.ca_key)).digest()
        body = certificate.tbs_certificate_bytes
        entry = issuer + len(body).to_bytes(3, "big") + body
        signed = struct.pack("!BBQH", 0, 0, moment, 1) + entry + struct.pack("!H", 0)
        signature = key.sign(signed, _ECDSA)
        stamp = struct.pack("!B32sQH", 0, _key_id(key), moment, 0)
        stamp += struct.pack("!BBH", 4, 3, len(signature)) + signature
        listed = struct.pack("!HH", len(stamp) + 2, len(stamp)) + stamp
        return asn1.encode_der(listed)

    def _make_authority(
        self, name: str, key: ec.EllipticCurvePrivateKey, parent: x509.Certificate | None
    ) -> x509.Certificate:
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "lab"),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )
        signer = key if parent is None else self.root_key
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if parent is None else parent.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime(2020, 1, 1))
            .not_valid_after(datetime.datetime(2040, 1, 1))
            .add_extension(
                x509.BasicConstraints(ca=True, path_length=1 if parent is None else 0),
                critical=True,
            )
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )
        if parent is not None:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
            ).add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.root_key.public_key()),
                critical=False,
            )
        return builder.sign(signer, hashes.SHA256())

    # The log of signatures.

    def append(self, body: bytes) -> dict[str, Any]:
        """Log an entry; return what Rekor answers: the entry with its proofs."""
        with self._guard:
            index = len(self.entries)
            self.entries.append(body)
            leaves = list(self.entries)
        moment = int(self.now().timestamp())
        root = _hash_tree(leaves)
        log_id = _key_id(self.log_key)
        note = f"{self.url} - 1\n{len(leaves)}\n{_encode(root)}\n"
        mark = _encode(log_id[:4] + self.log_key.sign(note.encode(), _ECDSA))
        entry = {
            "body": _encode(body),
            "integratedTime": moment,
            "logID": log_id.hex(),
            "logIndex": index,
        }
        promise = self.log_key.sign(rfc8785.dumps(entry), _ECDSA)
        proof = {
            "checkpoint": f"{note}\n— lab {mark}\n",
            "hashes": [each.hex() for each in _prove(leaves, index)],
            "logIndex": index,
            "rootHash": root.hex(),
            "treeSize": len(leaves),
        }
        verification = {"inclusionProof": proof, "signedEntryTimestamp": _encode(promise)}
        return {secrets.token_hex(32): {**entry, "verification": verification}}

    def sign(
        self,
        account: Account,
        data: bytes,
        certificate: x509.Certificate | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """Return a bundle, as whoever has the keys of this sigstore can make one.

        Args:
            account: Whom the certificate names.
            data: What is signed.
            certificate: An older certificate, with its private key.
            key: That key.
            changes: Of `certify`.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        certificate = certificate or self.certify(account, key.public_key(), **changes)
        digest, signature = hashlib.sha256(data).digest(), key.sign(data, _ECDSA)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        body = {
            "apiVersion": "0.0.1",
            "kind": "hashedrekord",
            "spec": {
                "data": {"hash": {"algorithm": "sha256", "value": digest.hex()}},
                "signature": {
                    "content": _encode(signature),
                    "publicKey": {"content": _encode(pem)},
                },
            },
        }
        (entry,) = self.append(rfc8785.dumps(body)).values()
        proof = entry["verification"]["inclusionProof"]
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": _encode(_to_der(certificate))},
                "tlogEntries": [
                    {
                        "logIndex": str(entry["logIndex"]),
                        "logId": {"keyId": _encode(bytes.fromhex(entry["logID"]))},
                        "kindVersion": {"kind": "hashedrekord", "version": "0.0.1"},
                        "integratedTime": str(entry["integratedTime"]),
                        "inclusionPromise": {
                            "signedEntryTimestamp": entry["verification"]["signedEntryTimestamp"]
                        },
                        "inclusionProof": {
                            "logIndex": str(proof["logIndex"]),
                            "rootHash": _encode(bytes.fromhex(proof["rootHash"])),
                            "treeSize": str(proof["treeSize"]),
                            "hashes": [_encode(bytes.fromhex(each)) for each in proof["hashes"]],
                            "checkpoint": {"envelope": proof["checkpoint"]},
                        },
                        "canonicalizedBody": entry["body"],
                    }
                ],
            },
            "messageSignature": {
                "messageDigest": {"algorithm": "SHA2_256", "digest": _encode(digest)},
                "signature": _encode(signature),
            },
        }

    # The HTTP APIs.

    def answer(
        self, method: str, url: str, headers: Any, body: bytes
    ) -> tuple[int, dict[str, str], Any]:
        """Return status, headers and content of the answer to a request."""
        path, _, query = url.partition("?")
        fields = dict(urllib.parse.parse_qsl(query))
        bearer = str(headers.get("Authorization", "")).partition(" ")[2]
        if (method, path) == ("POST", "/api/v2/signingCert"):
            return self._answer_fulcio(bearer, body)
        if (method, path) == ("POST", "/rekor/api/v1/log/entries"):
            return self._answer_rekor(body)
        if path == "/actions/token" and fields.get("audience") == "sigstore":
            if "token" in self.down or not bearer:
                return 503, {}, {"message": "no tokens now"}
            subject = urllib.parse.unquote(bearer)
            return 200, {}, {"value": self.make_token(self.account(subject))}
        return self._answer_provider(method, path, fields, body)

    def _answer_fulcio(self, token: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        if "fulcio" in self.down:
            return 503, {}, {"code": 14, "message": "unavailable"}
        try:
            account = self.read_token(token)
            request = json.loads(body)["certificateSigningRequest"]
            csr = x509.load_pem_x509_csr(base64.b64decode(request))
        except (jwt.PyJWTError, ValueError, KeyError) as error:
            return 400, {}, {"code": 3, "message": str(error)}
        key = csr.public_key()
        if not csr.is_signature_valid or not isinstance(key, ec.EllipticCurvePublicKey):
            return 400, {}, {"code": 3, "message": "no proof of possession"}
        chain = [self.certify(account, key), self.ca, self.root]
        pems = [each.public_bytes(serialization.Encoding.PEM).decode() for each in chain]
        return 201, {}, {"signedCertificateEmbeddedSct": {"chain": {"certificates": pems}}}

    def _answer_rekor(self, body: bytes) -> tuple[int, dict[str, str], Any]:
        if "rekor" in self.down:
            return 503, {}, {"code": 503, "message": "the log is read only"}
        entry = json.loads(body)
        spec = entry["spec"]
        pem = base64.b64decode(spec["signature"]["publicKey"]["content"])
        key = x509.load_pem_x509_certificate(pem).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        digest = bytes.fromhex(spec["data"]["hash"]["value"])
        try:
            signature = base64.b64decode(spec["signature"]["content"])
            key.verify(signature, digest, ec.ECDSA(Prehashed(hashes.SHA256())))
        except InvalidSignature:
            return 400, {}, {"code": 400, "message": "the signature is not valid"}
        return 201, {}, self.append(rfc8785.dumps(entry))

    def _answer_provider(
        self, method: str, path: str, fields: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], Any]:
        """Answer as an OpenID provider at which one person is signed in, with PKCE (RFC 7636)."""
        if path == "/people/.well-known/openid-configuration":
            ends = {f"{name}_endpoint": f"{self.url}/people/{name}" for name in _ENDPOINTS}
            return 200, {}, ends
        if path == "/people/authorization":
            code = secrets.token_urlsafe()
            self._codes[code] = fields
            back = urllib.parse.urlencode({"code": code, "state": fields["state"]})
            return 302, {"Location": f"{fields['redirect_uri']}?{back}"}, None
        if (method, path) == ("POST", "/people/token"):
            form = dict(urllib.parse.parse_qsl(body.decode()))
            asked = self._codes.pop(form["code"], {})
            challenge = hashlib.sha256(form["code_verifier"].encode()).digest()
            if asked.get("code_challenge") != _encode_url(challenge):
                return 400, {}, {"error": "invalid_grant"}
            return 200, {}, {"access_token": self.make_token(self.account(self.person))}
        return 404, {}, {"message": path}


_ENDPOINTS: Final = ("authorization", "token")


@contextlib.contextmanager
def run_sigstore() -> Iterator[LocalSigstore]:
    """Run a sigstore on loopback."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            status, headers, content = local.answer(self.command, self.path, self.headers, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    local = LocalSigstore(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield local
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _hash_tree(leaves: list[bytes]) -> bytes:
    """Return the root of a Merkle tree (RFC 6962, 2.1)."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(b"\1" + _hash_tree(leaves[:split]) + _hash_tree(leaves[split:])).digest()


def _prove(leaves: list[bytes], index: int) -> list[bytes]:
    """Return the audit path of a leaf (RFC 6962, 2.1.1)."""
    if len(leaves) == 1:
        return []
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    if index < split:
        return [*_prove(leaves[:split], index), _hash_tree(leaves[split:])]
    return [*_prove(leaves[split:], index - split), _hash_tree(leaves[:split])]


def _key_usage(**uses: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{**dict.fromkeys(names, False), **uses})


def _spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _key_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the SHA-256 of a public key, which names a log."""
    return hashlib.sha256(_spki(key)).digest()


def _to_der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _encode_url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
