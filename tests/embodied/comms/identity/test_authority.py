import threading
from datetime import UTC, datetime, timedelta

import pytest
from certificates import Hosts
from cryptography import x509

from embodied.comms.identity.authority import Authority
from embodied.comms.identity.peer import Peer, peer_of
from embodied.core.errors import ConfigError, CorruptDataError, IdentityError


@pytest.fixture
def hosts(tmp_path):
    return Hosts(tmp_path)


def modes(folder):
    found = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    return folder.stat().st_mode & 0o777, {k: v for k, v in found.items() if not v & 0o077}, found


def test_private_keys_are_for_their_owner_only(hosts):
    for folder, private in (
        (hosts.authority.folder, {"ca.key", "weights.key"}),
        (hosts.gateway(), {"key.pem", "weights.key"}),
        (hosts.robot(), {"key.pem"}),
    ):
        mode, closed, _ = modes(folder)
        assert mode == 0o700 and set(closed) == private and set(closed.values()) == {0o600}


def test_a_host_gets_all_it_needs_and_nothing_that_it_does_not(hosts):
    common = {"ca.pem", "certificate.pem", "key.pem", "weights.pub"}
    assert {path.name for path in hosts.robot().iterdir()} == common
    assert {path.name for path in hosts.gateway().iterdir()} == common | {
        "weights.key",
        "revoked.crl",
    }
    assert not list(hosts.folder.glob(".*")), "temporary folders are left"


def test_what_is_there_is_never_overwritten(hosts, tmp_path):
    before = (hosts.authority.folder / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="already holds an authority"):
        Authority.create(hosts.authority.folder, "lab")
    assert (hosts.authority.folder / "ca.key").read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        Authority.create(other, "lab")
    with pytest.raises(ConfigError, match="holds no certificate"):
        hosts.robot(output=other)
    robot = hosts.robot()
    for wrong in (lambda: hosts.robot("arm-2", output=robot), lambda: hosts.gateway(output=robot)):
        with pytest.raises(ConfigError, match="certificate of robot 'arm-1'"):
            wrong()
    assert len(hosts.authority.issued()) == 1, "what was not written is listed"
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_renewal_replaces_key_and_certificate_in_place(hosts):
    folder = hosts.robot(runs=["a"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hosts.robot(runs=["b"], output=folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"key.pem", "certificate.pem"} and set(before) == set(after)
    assert peer_of(after["certificate.pem"]).runs == ("b",)
    assert modes(folder)[2]["key.pem"] == 0o600


def test_certificates_end_when_they_should(hosts):
    folder = hosts.robot(lifetime=timedelta(hours=6))
    certificate = x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(hours=5, minutes=55) < left <= timedelta(hours=6)
    hosts.gateway()
    six_hours, thirty_days = (entry.expires - entry.starts for entry in hosts.authority.issued())
    assert (six_hours, thirty_days) == (timedelta(hours=6), timedelta(days=30))
    for lifetime in (timedelta(0), timedelta(days=-1), timedelta(days=3700)):
        with pytest.raises(ConfigError, match="cannot be issued"):
            hosts.robot("arm-2", lifetime=lifetime)


@pytest.mark.parametrize(
    ("issue", "words"),
    [
        (lambda hosts: hosts.robot(runs=[]), "'*' alone permits all"),
        (lambda hosts: hosts.robot(runs=["a*b"]), "'a*b' is no pattern"),
        (lambda hosts: hosts.robot(runs=["../x"]), "no pattern"),
        (lambda hosts: hosts.robot("Arm"), "'Arm' cannot be a host's name"),
        (lambda hosts: hosts.robot("../arm"), "cannot be a host's name"),
        (lambda hosts: hosts.robot("a" * 65), "1 to 64"),
        (lambda hosts: hosts.robot(dns=["arm.lab"]), "is not dialled"),
        (lambda hosts: hosts.gateway(ip=[]), "needs the names"),
        (lambda hosts: hosts.gateway(ip=["127.0.0"]), "--ip"),
        (lambda hosts: hosts.gateway(dns=["a b"]), "'a b' is not a DNS name"),
        (lambda hosts: hosts.gateway(dns=["embodied://robot/x"]), "not a DNS name"),
    ],
)
def test_wrong_requests_say_what_is_right_and_issue_nothing(hosts, issue, words):
    with pytest.raises(ConfigError) as error:
        issue(hosts)
    assert words in str(error.value)
    assert hosts.authority.issued() == []


def test_revoking_by_name_by_serial_and_again(hosts):
    hosts.robot("arm-1")
    hosts.robot("arm-1", output=hosts.folder / "arm-1")
    hosts.robot("arm-2")
    serials = [entry.serial for entry in hosts.authority.issued()]
    assert [entry.serial for entry in hosts.authority.revoke(serials[0])] == serials[:1]
    assert [entry.serial for entry in hosts.authority.revoke("arm-1")] == serials[1:2]
    assert hosts.authority.revoke("arm-1") == []
    with pytest.raises(ConfigError, match="Did you mean 'arm-2'"):
        hosts.authority.revoke("arm-22")
    revoked = x509.load_pem_x509_crl((hosts.authority.folder / "revoked.crl").read_bytes())
    assert {f"{entry.serial_number:x}" for entry in revoked} == set(serials[:2])
    again = Authority.open(hosts.authority.folder)
    assert [entry.revoked is not None for entry in again.issued()] == [True, True, False]


def test_two_may_issue_and_revoke_at_once(hosts):
    def _issue(number):
        authority = Authority.open(hosts.authority.folder)
        for index in range(5):
            name = f"arm-{number}-{index}"
            authority.issue(Peer("robot", name, ("*",)), hosts.folder / name)
            authority.revoke(name)

    threads = [threading.Thread(target=_issue, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({entry.serial for entry in hosts.authority.issued()}) == 20
    revoked = x509.load_pem_x509_crl((hosts.authority.folder / "revoked.crl").read_bytes())
    assert len(list(revoked)) == 20


def test_a_folder_that_holds_no_working_authority_is_refused(hosts, tmp_path):
    folder = hosts.authority.folder
    with pytest.raises(ConfigError, match="embodied pki init"):
        Authority.open(tmp_path / "nowhere")
    (folder / "ca.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Authority.open(folder)
    (folder / "ca.key").chmod(0o600)
    (folder / "issued.json").write_text("[{}]")
    with pytest.raises(CorruptDataError, match=r"issued\.json is damaged"):
        hosts.robot()
    other = Hosts(tmp_path / "other").authority.folder
    (folder / "ca.key").write_bytes((other / "ca.key").read_bytes())
    with pytest.raises(IdentityError, match="another private key"):
        Authority.open(folder)
