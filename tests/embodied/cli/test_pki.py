import pytest

from embodied.cli.main import main
from embodied.comms.identity.authority import Authority
from embodied.comms.identity.credentials import load_bundle
from embodied.comms.identity.peer import check_peer
from embodied.core.errors import IdentityError


@pytest.fixture
def pki(capsys, monkeypatch):
    """Run `embodied pki …`: (status, what it printed, its error)."""
    monkeypatch.setenv("COLUMNS", "160")

    def _pki(*words):
        status = main(["pki", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, " ".join(captured.err.split())

    return _pki


def test_from_nothing_to_a_revoked_robot(pki, tmp_path):
    ca, hub, arm = tmp_path / "ca", tmp_path / "hub", tmp_path / "arm"
    assert pki("init", ca)[0] == 0
    assert pki("issue", ca, "gateway", "hub", "--dns", "hub.lab", "--output", hub)[0] == 0
    words = ("issue", ca, "robot", "arm", "--runs", "reach-*", "push", "--days", "0.5")
    status, said, _ = pki(*words, "--output", arm)
    serial = Authority.open(ca).issued()[1].serial
    assert status == 0 and serial in said and str(arm) in said
    gateway, robot = load_bundle(hub), load_bundle(arm)
    assert check_peer(robot.certificate_pem, gateway.revocations(), "reach-1").name == "arm"

    status, said, _ = pki("list", ca)
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert status == 0 and "gateway" in rows["hub"] and "valid" in rows["hub"]
    assert serial in rows["arm"] and "reach-* push" in rows["arm"] and "valid" in rows["arm"]

    status, said, _ = pki("revoke", ca, "arm")
    assert status == 0 and serial in said and str(ca / "revoked.crl") in said
    (hub / "revoked.crl").write_bytes((ca / "revoked.crl").read_bytes())
    with pytest.raises(IdentityError, match="revoked"):
        check_peer(robot.certificate_pem, gateway.revocations(), "reach-1")
    assert "revoked" in pki("list", ca)[1]
    assert "were revoked before" in pki("revoke", ca, serial)[1]


def test_wrong_input_ends_in_one_paragraph(pki, tmp_path):
    ca = tmp_path / "ca"
    assert pki("init", ca)[0] == 0
    issue = ("issue", ca, "robot", "arm", "--output", tmp_path / "arm")
    for words, message in (
        (("init", ca), "already holds an authority"),
        (("init", tmp_path / "new", "--name", "A B"), "cannot be a host's name"),
        (("list", tmp_path / "nowhere"), "embodied pki init"),
        (issue, "'*' alone permits all"),
        ((*issue, "--runs", "*", "--days", "0"), "--days 0"),
        ((*issue, "--runs", "*", "--days", "nan"), "--days nan"),
        ((*issue, "--runs", "*", "--ip", "127.0.0.1"), "is not dialled"),
        (("revoke", ca, "arm"), "unknown certificate 'arm'"),
    ):
        status, _, said = pki(*words)
        assert status == 2 and message in said and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca"]
