"""Parts are written and read as the generated code does, and the generated code is the file's."""

import sys
from pathlib import Path

import crc32c
import grpc_tools
import pytest
from google.protobuf.message import DecodeError
from grpc_tools import protoc
from hypothesis import given
from hypothesis import strategies as st

from embodied.comms import links
from embodied.comms.links import link_pb2 as pb
from embodied.comms.links import wire
from embodied.core.errors import CorruptDataError

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**62)


@given(U32, U64, U64, U64, st.lists(st.binary(max_size=100), min_size=1, max_size=4))
def test_a_part_is_written_as_the_generated_code_writes_it(kind, message, offset, total, views):
    data = b"".join(views)
    if not data:
        return
    ours = wire.part_piece(kind, message, offset, total, views)
    part = pb.Part(
        kind=kind,
        message=message,
        offset=offset,
        total=total,
        crc32c=crc32c.crc32c(data),
        data=data,
    )
    assert ours == pb.Piece(part=part).SerializeToString()
    found = wire.parse(ours)
    assert isinstance(found, wire.Part)
    assert (found.kind, found.message, found.offset, found.total) == (kind, message, offset, total)
    assert found.crc32c == part.crc32c and bytes(found.data) == data


def varint(value):
    return wire._varint(value)


@given(st.data())
def test_a_damaged_part_is_read_as_the_generated_code_reads_it(data):
    raw = bytearray(wire.part_piece(3, 7, 1 << 20, 1 << 28, [bytes(range(200))]))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 60))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(raw), len(raw) - 1, 90, 3]))
    check_same(bytes(raw[:end]))


@given(st.binary(max_size=300))
def test_any_bytes_are_read_as_the_generated_code_reads_them(raw):
    check_same(raw)
    check_same(b"\x1a" + varint(len(raw)) + raw)


def check_same(raw):
    try:
        theirs = pb.Piece.FromString(raw)
    except DecodeError:
        with pytest.raises(CorruptDataError):
            wire.parse(raw)
        return
    body = theirs.WhichOneof("body")
    if body is None:
        with pytest.raises(CorruptDataError, match="without a body"):
            wire.parse(raw)
        return
    ours = wire.parse(raw)
    if body != "part":
        assert ours == theirs
        return
    part = theirs.part
    assert isinstance(ours, wire.Part)
    assert (ours.kind, ours.message, ours.offset) == (part.kind, part.message, part.offset)
    assert (ours.total, ours.crc32c, bytes(ours.data)) == (part.total, part.crc32c, part.data)


@pytest.mark.parametrize("name", ["", "-x", "a/b", "../x", "a b", "ü", "x" * 65])
def test_names_that_could_be_paths_are_refused(name):
    with pytest.raises(CorruptDataError, match="is no name"):
        wire.parse_hello(wire.hello_piece(wire.Hello(name, "", "")))


@pytest.mark.parametrize("low,high", [(2, 3), (0, 0)])
def test_versions_that_do_not_meet_are_named(low, high):
    hello = pb.Hello(min_version=low, max_version=high, host="h")
    with pytest.raises(CorruptDataError, match=f"speaks versions {low} to {high}.*version 1"):
        wire.parse_hello(pb.Piece(hello=hello).SerializeToString())


def test_the_generated_code_is_that_of_the_proto_file(tmp_path):
    folder = Path(links.__file__).parent
    include = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [f"-I{folder}", f"-I{include}", f"--python_out={tmp_path}"]
    assert protoc.main(["", *arguments, f"--pyi_out={tmp_path}", "link.proto"]) == 0
    for name in ("link_pb2.py", "link_pb2.pyi"):
        assert (tmp_path / name).read_text() == (folder / name).read_text(), (
            f"regenerate: {sys.executable} -m grpc_tools.protoc -I embodied/comms/links "
            "--python_out=embodied/comms/links --pyi_out=embodied/comms/links link.proto"
        )
