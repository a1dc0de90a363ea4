import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied.comms.identity.binding import check_dial, check_listen
from embodied.core.errors import ConfigError

LOOPBACK = ["127.0.0.1:0", "127.8.9.1:50051", "[::1]:50051", "localhost:1", "unix:/run/x.sock"]
ELSEWHERE = [
    "10.0.0.1:1",
    "192.168.1.5:50051",
    "[fe80::1]:1",
    "gateway.lab:443",
    "localhost.lab:1",
    "[::ffff:127.0.0.1]:1",
    "128.0.0.1:1",
]
NONSENSE = [
    "",
    ":50051",
    "*:50051",
    "0:50051",
    "127.1:50051",
    "0x7f.1:50051",
    "0177.0.0.1:1",
    "127.0.0.1",
    "127.0.0.1:",
    "127.0.0.1:65536",
    "127.0.0.1:-1",
    "127.0.0.1:٣",
    "127.0.0.1:80:80",
    "::1:80",
    "[127.0.0.1]:80",
    "[localhost]:80",
    "dns:///127.0.0.1:80",
    "ipv4:127.0.0.1:80",
    "unix:x.sock",
    "unix-abstract:x",
    "127.0.0.1:80\n",
    "127.0.0.1 :80",
    "a@127.0.0.1:80",
]


@pytest.mark.parametrize("check", [check_listen, check_dial])
def test_this_host_needs_no_certificate_and_others_do(check):
    for address in LOOPBACK:
        assert check(address, False) == check(address, True) == address
    for address in ELSEWHERE:
        assert check(address, True) == address
        with pytest.raises(ConfigError, match=r"without a certificate.*embodied pki issue"):
            check(address, False)


@pytest.mark.parametrize("address", NONSENSE)
@pytest.mark.parametrize("check", [check_listen, check_dial])
def test_what_is_not_spelled_out_is_refused_with_or_without(check, address):
    for has_identity in (False, True):
        with pytest.raises(ConfigError, match="address"):
            check(address, has_identity)


def test_all_interfaces_only_when_spelled_out_and_with_a_certificate():
    for address in ("0.0.0.0:50051", "[::]:50051"):
        assert check_listen(address, True) == address
        with pytest.raises(ConfigError, match="other hosts can connect"):
            check_listen(address, False)
        with pytest.raises(ConfigError, match="names no host"):
            check_dial(address, True)
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 or \[::\]"):
        check_listen("[0:0::0]:50051", True)


@given(st.text("0127.:[]localhst*unix/-x٣ \n", max_size=24))
def test_any_text_is_an_address_of_this_host_or_an_error(text):
    try:
        check_listen(text, False)
    except ConfigError:
        return
    assert text.startswith(("127.", "[", "localhost:", "unix:/"))
