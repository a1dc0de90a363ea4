"""Certificates that `embodied pki` did not make: rejected by IdentityError, whatever they hold."""

import os
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import Hosts, long_ago
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.comms.identity.credentials import load_bundle
from embodied.comms.identity.peer import Peer, Revocations, check_peer, check_robot, peer_of
from embodied.core.errors import IdentityError

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
_KEY = ec.generate_private_key(ec.SECP256R1())


def made(names=None, usages=None):
    """A certificate with any names and usages (None: without that extension)."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(_KEY.public_key())
        .serial_number(7)
        .not_valid_before(datetime.now(UTC))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(_KEY, SHA256()).public_bytes(Encoding.PEM)


def uris(*texts):
    return [x509.UniformResourceIdentifier(text) for text in texts]


@pytest.fixture(scope="module")
def hosts():
    with tempfile.TemporaryDirectory() as folder:
        yield Hosts(Path(folder))


@pytest.fixture(scope="module")
def robot(hosts):
    return hosts.robot("fuzzed", runs=["a", "b*"])


@pytest.fixture(scope="module")
def genuine(robot):
    return (robot / "certificate.pem").read_bytes()


@pytest.fixture
def revocations(hosts):
    return Revocations(
        hosts.authority.folder / "revoked.crl", (hosts.authority.folder / "ca.pem").read_bytes()
    )


def test_names_come_back_as_they_were_given(genuine):
    assert peer_of(genuine) == Peer("robot", "fuzzed", ("a", "b*"))
    names = uris("embodied://robot/r", "embodied://run/*")
    assert peer_of(made(names, [CLIENT])) == Peer("robot", "r", ("*",))


@pytest.mark.parametrize(
    ("names", "usages"),
    [
        (None, [CLIENT]),
        (uris("embodied://robot/r", "embodied://run/*"), None),
        (uris("embodied://robot/r", "embodied://run/*"), [SERVER]),
        (uris("embodied://robot/r", "embodied://run/*"), [CLIENT, SERVER]),
        (uris("embodied://gateway/g"), [CLIENT]),
        (uris("embodied://gateway/g", "embodied://robot/g", "embodied://run/*"), [CLIENT]),
        (uris("embodied://robot/r", "embodied://robot/s", "embodied://run/*"), [CLIENT]),
        (uris("embodied://robot/r"), [CLIENT]),
        (uris("embodied://run/*"), [CLIENT]),
        (uris("embodied://robot/r", "embodied://run/a*b"), [CLIENT]),
        (uris("embodied://robot/r", "embodied://run/**"), [CLIENT]),
        (uris("embodied://robot/../r", "embodied://run/*"), [CLIENT]),
        (uris("embodied://robot/r", "embodied://run/*", "https://x/y"), [CLIENT]),
        (uris("embodied://robot/r", *["embodied://run/a"] * 65), [CLIENT]),
        (uris("embodied://gateway/g", "embodied://run/*"), [SERVER]),
        ([x509.DNSName("embodied://robot/r"), x509.DNSName("embodied://run/*")], [CLIENT]),
    ],
)
def test_names_and_usages_that_are_not_ours(names, usages):
    with pytest.raises(IdentityError):
        peer_of(made(names, usages))


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.one_of(
            st.sampled_from(["embodied://robot/r", "embodied://run/*", "embodied://gateway/g"]),
            st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80),
            st.from_regex(r"\Aembodied://(robot|run|gateway)/[ -~]{0,70}\Z"),
        ),
        min_size=1,
        max_size=6,
    ),
    usages=st.lists(st.sampled_from([CLIENT, SERVER]), min_size=1, max_size=2),
)
def test_any_names(texts, usages):
    pem = made(uris(*texts), usages)
    try:
        peer = peer_of(pem)
    except IdentityError:
        return
    assert sorted(peer.uris()) == sorted(texts), "a name was dropped or read as another"
    assert usages == [SERVER if peer.role == "gateway" else CLIENT]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_damaged_certificates(genuine, data):
    body = bytearray(genuine)
    start, end = len(b"-----BEGIN CERTIFICATE-----\n"), len(genuine)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(start, end - 1))
        body[place] = data.draw(
            st.sampled_from(b"ABCDEFGHabcdefgh0123456789+/=\n") | st.integers(0, 255)
        )
    cut = data.draw(st.one_of(st.just(end), st.integers(0, end)))
    try:
        peer_of(bytes(body[:cut]))
    except IdentityError:
        return


@settings(max_examples=40, deadline=None)
@given(pem=st.binary(max_size=300), head=st.booleans())
def test_anything_at_all(robot, pem, head):
    if head:
        pem = b"-----BEGIN CERTIFICATE-----\n" + pem + b"\n-----END CERTIFICATE-----\n"
    with pytest.raises(IdentityError):
        peer_of(pem)
    for name in ("ca.pem", "certificate.pem", "key.pem", "weights.pub"):
        whole = (robot / name).read_bytes()
        (robot / name).write_bytes(pem)
        with pytest.raises(IdentityError):
            load_bundle(robot)
        (robot / name).write_bytes(whole)


def test_each_reason_to_refuse_is_named(hosts, revocations, tmp_path):
    def _pem(folder):
        return (folder / "certificate.pem").read_bytes()

    right = _pem(hosts.robot("right", runs=["mine"]))
    assert check_peer(right, revocations, "mine").name == "right"
    foreign = Hosts(tmp_path)
    for pem, words in (
        (_pem(foreign.robot("right")), "not issued by this authority"),
        (_pem(hosts.robot("old", starts=long_ago())), "expired"),
        (_pem(hosts.gateway("hub")), "gateway 'hub' opened a session"),
        (made(uris("embodied://robot/r", "embodied://run/*"), [CLIENT]), "not issued by"),
        ((hosts.authority.folder / "ca.pem").read_bytes(), "not issued by|whose it is"),
    ):
        with pytest.raises(IdentityError, match=words):
            check_robot(pem, revocations)
    with pytest.raises(IdentityError, match="may not take part in run 'yours'"):
        check_peer(right, revocations, "yours")


def test_revocations_are_read_when_they_change_and_only_ours_count(hosts, revocations, tmp_path):
    pem = (hosts.robot("stolen") / "certificate.pem").read_bytes()
    check_robot(pem, revocations)
    hosts.authority.revoke("stolen")
    with pytest.raises(IdentityError, match=r"of robot 'stolen' is revoked"):
        check_robot(pem, revocations)
    foreign = Hosts(tmp_path / "foreign")
    ours = (hosts.authority.folder / "revoked.crl").read_bytes()
    theirs = (foreign.authority.folder / "revoked.crl").read_bytes()
    path = tmp_path / "revoked.crl"
    path.write_bytes(ours)
    copied = Revocations(path, (hosts.authority.folder / "ca.pem").read_bytes())
    for index, wrong in enumerate((theirs, ours[:-60], b"", pem)):
        path.write_bytes(wrong)
        os.utime(path, ns=(index, index))  # two writes within a tick of the clock
        with pytest.raises(IdentityError, match=r"not signed by|not a revocation list"):
            check_robot(pem, copied)
    path.unlink()
    with pytest.raises(IdentityError, match="nobody is admitted"):
        check_robot(pem, copied)
