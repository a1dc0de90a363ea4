"""What a host's folder must hold, and what is said if it does not."""

import shutil
from datetime import timedelta

import pytest
from certificates import Hosts, long_ago

from embodied.comms.identity import signing
from embodied.comms.identity.credentials import (
    NewestBundle,
    channel_credentials,
    load_bundle,
    server_credentials,
)
from embodied.core.errors import ConfigError, IdentityError


@pytest.fixture
def hosts(tmp_path):
    return Hosts(tmp_path)


@pytest.fixture
def other(tmp_path):
    return Hosts(tmp_path / "other")


def test_a_folder_says_whose_it_is(hosts):
    robot, gateway = load_bundle(hosts.robot(runs=["a", "b*"])), load_bundle(hosts.gateway())
    assert (robot.peer.role, robot.peer.name, robot.peer.runs) == ("robot", "arm-1", ("a", "b*"))
    assert (gateway.peer.role, gateway.peer.name, gateway.peer.runs) == ("gateway", "hub", ())
    assert robot.expires == hosts.authority.issued()[0].expires.replace(microsecond=0)
    assert b"PRIVATE" not in repr((robot, gateway)).encode(), "keys would land in logs"
    with pytest.raises(IdentityError, match="this needs a gateway's"):
        server_credentials(lambda: robot)
    with pytest.raises(IdentityError, match="this needs a robot's"):
        channel_credentials(gateway)
    with pytest.raises(IdentityError, match="this needs a gateway's"):
        robot.revocations()


@pytest.mark.parametrize(
    "name", ["ca.pem", "certificate.pem", "key.pem", "weights.pub", "weights.key"]
)
def test_a_missing_damaged_or_foreign_file_is_named(hosts, other, name):
    folder = hosts.gateway()
    right = (folder / name).read_bytes()
    foreign = (other.gateway() / name).read_bytes()
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} does not exist.*embodied pki"):
        load_bundle(folder)
    for wrong in (b"", b"\0" * 100, right[: len(right) // 2], foreign):
        (folder / name).write_bytes(wrong)
        (folder / name).chmod(0o600)
        if (name, wrong) == ("weights.pub", foreign):
            with pytest.raises(IdentityError, match=r"weights\.key"):
                load_bundle(folder)
            continue
        with pytest.raises(IdentityError):
            load_bundle(folder)
    (folder / name).write_bytes(right * 1000)
    with pytest.raises(ConfigError, match="more than 65536 bytes"):
        load_bundle(folder)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
@pytest.mark.parametrize("name", ["key.pem", "weights.key"])
def test_a_key_that_others_may_read_is_refused(hosts, name, mode):
    folder = hosts.gateway()
    (folder / name).chmod(mode)
    with pytest.raises(ConfigError, match=rf"chmod 600 .*{name}"):
        load_bundle(folder)


def test_dates_are_checked(hosts):
    with pytest.raises(IdentityError, match=r"expired on .*embodied pki issue"):
        load_bundle(hosts.robot(starts=long_ago()))
    ahead = hosts.authority.certificate.not_valid_after_utc - timedelta(days=60)
    with pytest.raises(IdentityError, match="set this host's clock"):
        load_bundle(hosts.robot("arm-2", starts=ahead))


def test_a_key_of_another_certificate_is_refused(hosts):
    folder = hosts.robot()
    shutil.copy(hosts.robot("arm-2") / "key.pem", folder / "key.pem")
    with pytest.raises(IdentityError, match="another private key"):
        load_bundle(folder)


def test_a_certificate_that_a_host_signed_is_refused(hosts, tmp_path):
    """A robot's own key must not serve as an authority."""
    robot = hosts.robot()
    forged = Hosts(tmp_path / "forged").robot("arm-9")
    (forged / "ca.pem").write_bytes((robot / "certificate.pem").read_bytes())
    with pytest.raises(IdentityError, match="not issued by this authority"):
        load_bundle(forged)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="embodied pki issue"):
        load_bundle(tmp_path / "nowhere")


def test_signatures_hold_for_one_pair_of_keys_and_the_very_bytes(hosts, other):
    gateway, robot = load_bundle(hosts.gateway()), load_bundle(hosts.robot())
    foreign = load_bundle(other.gateway())
    assert gateway.weights_private_pem and foreign.weights_private_pem
    assert robot.weights_private_pem is None
    signature = signing.sign(gateway.weights_private_pem, b"manifest")
    assert len(signature) == signing.SIGNATURE_BYTES
    signing.verify(robot.weights_public_pem, b"manifest", signature)
    wrong = [
        (b"manifesu", signature),
        (b"", signature),
        (b"manifest", b""),
        (b"manifest", signature[:-1]),
        (b"manifest", signature + b"\0"),
        (b"manifest", bytes([signature[0] ^ 1]) + signature[1:]),
        (b"manifest", signing.sign(foreign.weights_private_pem, b"manifest")),
    ]
    for data, given in wrong:
        with pytest.raises(IdentityError, match="does not fit"):
            signing.verify(robot.weights_public_pem, data, given)
    for key in (b"", robot.key_pem, robot.weights_public_pem, b"\xff" * 40):
        with pytest.raises(IdentityError, match="key for signing"):
            signing.sign(key, b"manifest")
        if key != robot.weights_public_pem:
            with pytest.raises(IdentityError, match="key for checking"):
                signing.verify(key, b"manifest", signature)


def test_a_folder_is_read_again_when_it_changes(hosts, other):
    folder, refused = hosts.gateway(), []
    newest = NewestBundle(folder, refused.append)
    first = newest()
    assert newest() is first and not refused
    hosts.gateway(output=folder)
    second = newest()
    assert second.certificate_pem != first.certificate_pem and newest() is second

    whole = (folder / "certificate.pem").read_bytes()
    (folder / "certificate.pem").write_bytes(whole[: len(whole) // 2])
    assert newest() is second and newest() is second
    assert [str(e) for e in refused] == [str(e) for e in refused if "not a certificate" in str(e)]
    assert len(refused) == 1
    (folder / "certificate.pem").write_bytes(whole)
    assert newest().certificate_pem == whole and len(refused) == 1

    robot, foreign = hosts.robot(), other.gateway()
    for source, why in ((robot, "needs a gateway's"), (foreign, "another authority")):
        for name in ("ca.pem", "certificate.pem", "key.pem", "weights.pub"):
            (folder / name).write_bytes((source / name).read_bytes())
        if source is foreign:
            (folder / "weights.key").write_bytes((source / "weights.key").read_bytes())
        assert newest().certificate_pem == whole and why in str(refused[-1])
    (folder / "certificate.pem").unlink()
    assert newest().certificate_pem == whole and "does not exist" in str(refused[-1])
