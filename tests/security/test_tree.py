"""What must be nowhere in the product's tree, and nowhere but where it is accounted for."""

import ast
import re
from collections.abc import Iterator

from decoders import DECODERS, ELSEWHERE, OWN_FILES
from ports import PORTS
from tree import ROOT, calls, tracked, trees

IMPORTS = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("jsonpickle"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "execfile", "os.system", "os.popen"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("pandas.read_pickle", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
METHODS = {"recv_pyobj", "send_pyobj", "unsafe_load", "full_load", "read_pickle", "extractall"}
FALSE = {"allow_pickle", "shell"}
"""Arguments that may be False and nothing else."""

_CHECKS = "embodied/comms/identity/binding.py"
ALLOWED: dict[tuple[str, str], str] = {
    (_CHECKS, "0.0.0.0"): "the check that demands certificates for it",
    (_CHECKS, "[::]"): "what it says would be right",
    (_CHECKS, "::"): "the check that demands certificates for it",
}
"""(file, text) of all interfaces → why it is there all the same."""

OPENERS = {
    *("bind", "listen", "create_server", "start_server", "start_http_server", "serve_forever"),
    *("add_insecure_port", "add_secure_port", "HTTPServer", "ThreadingHTTPServer"),
    *("RequestServer", "DirectServer", "DeferredServer", "PullChannel", "LinkServer"),
}
"""Calls that open a port, of libraries and of embodied.comms."""

EVERYWHERE = re.compile(r"(0\.0\.0\.0|\[::\]|tcp://\*|tcp://:|(?<![\w:])::(?![\w:]))")


def dangers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything by which data could become code."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in IMPORTS)
    for node, name in calls(tree):
        if name in CALLS or ("." in name and name.rpartition(".")[2] in METHODS):
            yield node.lineno, name
        constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if name.endswith("import_module") and IMPORTS & {str(c) for c in constants}:
            yield node.lineno, name
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg in FALSE and not (isinstance(value, ast.Constant) and not value.value):
                yield node.lineno, f"{keyword.arg}="


def docstrings(tree: ast.Module) -> set[int]:
    """Ids of the constants that say what something is."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def test_data_never_become_code():
    found = [f"{n}:{line}: {what}" for n, tree in trees() for line, what in dangers(tree)]
    assert found == []


def test_nothing_names_all_interfaces():
    """Not in defaults, nor in an address that code makes: users spell them out."""
    found: set[tuple[str, str]] = set()
    for name, tree in trees():
        told = docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for match in EVERYWHERE.finditer("" if id(node) in told else node.value):
                    found.add((name, match[0]))
    assert found == set(ALLOWED)


def test_no_configuration_listens_on_all_interfaces_without_certificates():
    for name in tracked():
        if name.endswith((".py", ".pyi", ".proto")):
            continue
        text = (ROOT / name).read_text()
        if EVERYWHERE.search(re.sub(r"(?m)#.*$", "", text)):
            assert name == "deploy/compose.yaml", name
            assert "gateway.identity=" in text, "a container's gateway without certificates"


def test_what_binds_to_an_address_names_loopback():
    for name, tree in trees():
        for node, called in calls(tree):
            last = called.rpartition(".")[2]
            where = f"{name}:{node.lineno} {called}"
            if last == "start_http_server":
                hosts = node.args[1:2]
                assert hosts, f"{where}: its default is all interfaces"
            elif last in ("bind", "create_server") and node.args:
                address = node.args[0]
                hosts = address.elts[:1] if isinstance(address, ast.Tuple) else []
            else:
                continue
            for host in hosts:
                assert isinstance(host, ast.Constant) and host.value == "127.0.0.1", where


def test_every_port_is_in_the_table_that_is_attacked():
    """A call that opens a port, in a module that no port of `ports.PORTS` names, fails this."""
    opening = {
        name
        for name, tree in trees()
        for _, called in calls(tree)
        if called.rpartition(".")[2] in OPENERS and not name.startswith("benchmarks/")
    }
    known = {module for port in PORTS.values() for module in port.opened_by}
    primitives = {"embodied/comms/sockets.py"}  # binds for channels.py and deferred.py
    assert opening - known - primitives == set()
    assert known - opening == {"embodied/comms/channels.py", "embodied/comms/deferred.py"}
    for module in sorted(known):
        assert (ROOT / module).exists()


def test_every_module_that_decodes_is_accounted_for():
    """A new decoder belongs into DECODERS, or where it says who tests it or wrote its bytes."""
    words = ("msgpack.decode", "json.decode", "Decoder", "json.loads", "json.load", "FromString")
    words += ("get_frame_parameters", "numpy.load", "safe_open", "load_file", "Image.open")
    words += ("load_pem_x509_certificate", "load_pem_private_key", "load_pem_public_key")
    decoding = {
        name
        for name, tree in trees()
        if not name.startswith("benchmarks/")
        for _, called in calls(tree)
        if called.endswith(words)
    }
    fuzzed = {decoder.module for decoder in DECODERS.values()}
    known = fuzzed | set(ELSEWHERE) | OWN_FILES
    assert decoding - known == set(), "not accounted for"
    assert known - decoding == set(), "decodes nothing any more"
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


def test_the_scan_sees_what_it_is_for():
    for line in (
        "import pickle",
        "from cloudpickle import loads",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "eval('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import yaml\nyaml.load('x')",
        "socket.recv_pyobj()",
        "import importlib\nimportlib.import_module('pickle')",
        "import os\nos.system('x')",
    ):
        assert list(dangers(ast.parse(line))), line
    for line in ("import re\nre.compile('x')", "model.eval()", "np.load('x', allow_pickle=False)"):
        assert not list(dangers(ast.parse(line))), line
