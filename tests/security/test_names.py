"""Names from elsewhere that would lead out of their folder: refused, or only ever data."""

import tempfile
from pathlib import Path

import msgspec
import pytest
from hostile import PATHS
from linking import RawHost
from sites import run_gateway
from spooling import make_step

from embodied.buffer.interchange.lerobot import file_path
from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.spool.names import stream_name
from embodied.comms.codec import decode, encode
from embodied.comms.links import link_pb2 as pb
from embodied.comms.links.wire import Hello, problem_of
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError
from embodied.run.site import messages as m
from embodied.weights.acting import TensorSpec, check_layout
from embodied.weights.manifests import decode_update
from hal.listing import devices_of_hosts, note_host
from hal.robot import socket_name
from hal.safety.latch import Latch

LETTERS = [name for name in PATHS if name.isprintable()]
"""Those that text files and terminals can hold."""


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_no_host_and_no_run_has_such_a_name(name):
    assert problem_of(Hello(name, "", "")).startswith("host ")
    assert not name or problem_of(Hello("host", name, "")).startswith("run ")
    with pytest.raises(ConfigError, match="host name"):
        stream_name(name, "arm")


def test_a_gateway_refuses_hosts_with_such_names():
    with tempfile.TemporaryDirectory(prefix="n") as place, run_gateway(Path(place)) as gateway:
        for name in ("../x", "/x", "x\0y", "x" * 300, "\uff0e\uff0e"):
            greeting = pb.Hello(min_version=1, max_version=1, host=name)
            with RawHost(gateway.address) as host:
                host.send(pb.Piece(hello=greeting).SerializeToString())
                welcome = pb.Piece.FromString(next(host.call)).welcome
                assert welcome.version == 0 and "is no name" in welcome.refusal


@pytest.mark.parametrize("name", [name for name in PATHS if name.isascii()], ids=ascii)
def test_a_gateway_names_no_folder_of_its_hosts_like_that(name):
    """An Assignment's name becomes a folder under the host's root."""
    with pytest.raises(CorruptDataError, match="cannot be decoded"):
        decode(encode(m.Assignment("0" * 32, name, b"{}"), {}), m.REPLIES)


def test_a_run_whose_folder_hosts_could_not_have_has_no_gateway(tmp_path):
    with pytest.raises(ConfigError, match="my run"), run_gateway(tmp_path, run="my run"):
        pass


def test_names_of_devices_and_hosts_make_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    latches = tmp_path / "latches"
    latches.mkdir()
    for name in LETTERS:
        note_host(name, [])
        assert "/" not in socket_name(name)
        if len(name) < 100:
            Latch(latches, name or "x").set("stopped")
    assert devices_of_hosts() == []
    assert {path.name for path in tmp_path.iterdir()} == {"state", "latches"}
    assert all(path.parent == latches for path in files_below(latches))


def test_names_of_streams_tasks_and_features_stay_data(tmp_path):
    with LocalBuffer(tmp_path / "log") as buffer:
        for number, name in enumerate(LETTERS):
            step = make_step(number, 0, 0, stream=name[:200] or "x", task=name[:200])
            step.observation[f"observation.{name[:200]}"] = step.observation["observation.state"]
            buffer.add(step)
    assert {path.name for path in tmp_path.iterdir()} == {"log"}


@pytest.mark.parametrize("key", ["/etc", "../x", "a/../../x", "x\0y"], ids=ascii)
def test_a_data_set_does_not_lead_out_of_its_folder(tmp_path, key):
    for template in ("{video_key}/file.mp4", "videos/{video_key}/file.mp4"):
        try:
            found = file_path(tmp_path, template, 0, 0, key)
        except CorruptDataError as error:
            assert "leaves the data set" in str(error)
        else:
            assert tmp_path in found.parents and ".." not in found.parts


@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_versions_and_digests_of_weights_are_no_text(name):
    update = {"run_id": "r", "version": name, "base_version": None, "base_sha256": name}
    with pytest.raises(EmbodiedError):
        decode_update(msgspec.json.encode({**update, "sha256": "0"}) if name.isascii() else b"{}")
    check_layout((TensorSpec(name or "x", "bool", (1,)),), 1)  # a name of a tensor is data
