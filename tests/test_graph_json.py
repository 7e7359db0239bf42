"""Files written by someone who means harm: whatever the JSON says, it is refused before any of it runs."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import operator
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import Lambda, conv
from test_serialization import HEADER, reference_of

import fxq
from fxq.errors import FileFormatError, FxqError
from fxq.graph_json import decode_graph, encode_graph
from fxq.serialization import digest, load_for_tables, load_regions, with_header

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Content = dict[str, Any]
Edit = Callable[[Content, dict[str, Any]], Any]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    net = Lambda(lambda m, x: torch.relu(m.a(x)).reshape(x.shape[0], -1).cumsum(1), a=conv())
    path = tmp_path_factory.mktemp("honest") / "net.fxq"
    fxq.save(reference_of(net, X), path)
    return path.read_bytes()


@pytest.fixture
def forged(honest: bytes, tmp_path: Path) -> Callable[[Edit], Path]:
    """Write the honest file with an edit, under a checksum that fits."""

    def forge(edit: Edit) -> Path:
        content, tensors = opened(honest)
        edit(content["regions"][""], tensors["tensors "])
        path = tmp_path / "forged.fxq"
        path.write_bytes(closed(content, tensors))
        return path

    return forge


def opened(data: bytes) -> tuple[Content, dict[str, dict[str, Any]]]:
    """JSON and tensors of a file."""
    archive = torch.load(io.BytesIO(data[HEADER:]), weights_only=True)
    return json.loads(archive["content"]), archive["tensors"]


def closed(content: Content, tensors: dict[str, dict[str, Any]]) -> bytes:
    """The file of a forger who knows both checksums."""
    text, buffer = json.dumps(content), io.BytesIO()
    try:
        known = digest(text, tensors)
    except (AttributeError, RuntimeError):  # something other than plain tensors
        known = ""
    torch.save({"content": text, "tensors": tensors, "digest": known}, buffer)
    return with_header(buffer.getvalue())


def node(content: Content, op: str, target: str = "") -> dict[str, Any]:
    return next(n for n in content["nodes"] if n["op"] == op and n["target"].startswith(target))


def set_in(op: str, key: str, value: Any) -> Edit:
    return lambda content, _: node(content, op).__setitem__(key, value)


def call(target: str, *args: Any) -> Edit:
    """A node more, before the output."""
    record = {"name": "evil", "op": "call_function", "target": target, "args": {"tuple": list(args)}}
    return lambda content, _: content["nodes"].insert(-1, record | {"kwargs": {"dict": []}})


def quantize_argument(position: int, value: Any) -> Edit:
    """Of the last quantize node, whose upper bound is lowered so that lower bounds can be above it."""

    def edit(content: Content, _: Any) -> None:
        record = [n for n in content["nodes"] if n["target"] == "fxq:quantize"][-1]
        record["args"]["tuple"][4] = 254
        record["args"]["tuple"][position] = value

    return edit


def method(name: str) -> Edit:
    return set_in("call_method", "target", name)


def plan(key: str, value: Any) -> Edit:
    return lambda content, _: content["plan"].__setitem__(key, value)


def test_the_honest_file_loads(forged: Callable[[Edit], Path]) -> None:
    loaded = fxq.load(forged(lambda content, _: None))
    assert loaded(X).shape == (1, 256)
    assert {n.op for n in fxq.load_reference(forged(lambda c, _: None)).graph.nodes} >= {"call_method", "get_attr"}


FUNCTIONS = [
    "operator:call", "operator:methodcaller", "operator:attrgetter", "torch:load", "torch:from_file", "os:system",
    "posix:system", "builtins:eval", "builtins:exec", "builtins:__import__", "functional:__builtins__", "system",
    "torch:_C", "torch:from_numpy", "torch:frombuffer", "torch:sparse_coo_tensor", "torch.functional:torch", "",
    "torch:quantized_max_pool2d", "fxq:save", "functional:_canonical_mask", "functional:importlib",
]  # fmt: skip


@pytest.mark.parametrize("target", FUNCTIONS)
def test_a_function_that_is_not_listed(target: str, forged: Callable[[Edit], Path]) -> None:
    with pytest.raises(FileFormatError, match="'evil' names the function"):
        fxq.load_reference(forged(call(target, "touch /tmp/x")))


METHODS = ["__class__", "__reduce__", "map_", "apply_", "set_", "data_ptr", "numpy", "register_hook", "backward",
           "storage", "untyped_storage", "__init__", "share_memory_", "nope", "as_subclass"]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_not_listed(name: str, forged: Callable[[Edit], Path]) -> None:
    with pytest.raises(FileFormatError, match=f"names the method '{name}'"):
        fxq.load_reference(forged(method(name)))


ATTRIBUTES = ["__class__", "__globals__", "grad_fn", "__dict__", "storage", "__reduce_ex__", ""]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_is_not_listed(name: str, forged: Callable[[Edit], Path]) -> None:
    with pytest.raises(FileFormatError, match="reads the attribute"):
        fxq.load_reference(forged(call("builtins:getattr", {"node": "x"}, name)))


def test_an_attribute_named_by_a_node(forged: Callable[[Edit], Path]) -> None:
    with pytest.raises(FileFormatError):
        fxq.load_reference(forged(call("builtins:getattr", {"node": "x"}, {"node": "x"})))


INJECTIONS: dict[str, Edit] = {
    "input": set_in("placeholder", "target", "x=HIT()"),
    "input-lines": set_in("placeholder", "target", "x):\n    HIT()\ndef g(y"),
    "star": set_in("placeholder", "target", "***x"),
    "keyword": set_in("call_function", "kwargs", {"dict": [["a=HIT(),b", 1]]}),
    "keyword-number": set_in("call_function", "kwargs", {"dict": [[1, 1]]}),
    "path": set_in("get_attr", "target", 'a") if HIT() else ("'),
    "stored-path": lambda content, tensors: (
        tensors.__setitem__('a") if HIT() else ("', torch.ones(1)),
        node(content, "get_attr").__setitem__("target", 'a") if HIT() else ("'),
    ),
    "globals": set_in("get_attr", "target", "forward.__globals__"),
    "module": set_in("get_attr", "target", "meta"),
    "name": set_in("call_function", "name", "a = HIT()"),
    "name-reserved": set_in("placeholder", "name", "print"),
}


@pytest.mark.parametrize("edit", INJECTIONS.values(), ids=INJECTIONS)
def test_nothing_is_written_into_code(
    edit: Edit, forged: Callable[[Edit], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hits: list[int] = []
    monkeypatch.setattr(builtins, "HIT", lambda: hits.append(1), raising=False)
    with pytest.raises(FileFormatError, match=r"forged\.fxq"):
        fxq.load_reference(forged(edit))(X)
    assert not hits


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


MALFORMED: dict[str, Edit] = {
    "unknown kind": set_in("call_method", "op", "nope"),
    "call of no module": set_in("call_method", "op", "call_module"),
    "kind is a list": set_in("call_method", "op", []),
    "target is a number": set_in("call_function", "target", 3),
    "target is a list": set_in("call_function", "target", ["op:relu"]),
    "duplicate": lambda content, _: content["nodes"].insert(1, dict(content["nodes"][0])),
    "node used before it is": lambda content, _: content["nodes"].reverse(),
    "no output": lambda content, _: content["nodes"].pop(),
    "two outputs": lambda content, _: content["nodes"].append({**content["nodes"][-1], "name": "output_1"}),
    "args is text": set_in("call_function", "args", "abc"),
    "args is a number": set_in("call_function", "args", 1),
    "no args": set_in("call_method", "args", {"tuple": []}),
    "kwargs is a list": set_in("call_function", "kwargs", [1]),
    "unknown value": set_in("call_method", "args", {"code": "1"}),
    "value of two kinds": set_in("call_method", "args", {"tuple": [], "dict": []}),
    "unknown dtype": set_in("call_method", "args", {"tuple": [{"node": "x"}, {"dtype": "load"}]}),
    "unknown node": set_in("call_method", "args", {"tuple": [{"node": "nope"}]}),
    "deep": set_in("call_method", "args", nested(900)),
    "nodes is a dict": lambda content, _: content.__setitem__("nodes", {"a": 1}),
    "a node is null": lambda content, _: content["nodes"].insert(0, None),
    "no nodes": lambda content, _: content["nodes"].clear(),
    "tensor is missing": lambda _, tensors: tensors.clear(),
    "tensor is a number": lambda _, tensors: tensors.update(dict.fromkeys(tensors, 1)),
    "tensor is sparse": lambda _, tensors: tensors.update({k: t.to_sparse() for k, t in tensors.items()}),
    "tensor shadows a method": lambda _, tensors: tensors.__setitem__("forward", torch.ones(1)),
    "tensor of no name": lambda _, tensors: tensors.__setitem__("", torch.ones(1)),
    "stage": plan("stage", "lowered"),
    "unknown stage": plan("stage", "nope"),
    "stage is a list": plan("stage", []),
    "backend is a number": plan("backend", 3),
    "model is null": plan("model", None),
    "notes": plan("notes", [1]),
    "notes is null": plan("notes", None),
    "macs": plan("macs", {"a": "many"}),
    "properties": plan("properties", []),
    "weight_bytes": plan("weight_bytes", ["1", 2]),
    "equalized": plan("equalized", [["a", "b", ["1"]]]),
    "equalized is short": plan("equalized", [["a", "b"]]),
    "absorbed": plan("absorbed", [["a", "b", ["1"]]]),
    "absorbed is short": plan("absorbed", [["a", "b"]]),
    "weight_bytes is short": plan("weight_bytes", [1]),
    "facts": plan("facts", {"x": [["a"], "float32"]}),
    "facts of an unknown dtype": plan("facts", {"x": [[1], "system"]}),
    "no decisions": plan("decisions", {}),
    "decision of no node": lambda content, _: content["plan"]["decisions"].__setitem__("no", ["shape", None, None, ""]),
    "decision without a reason": lambda content, _: content["plan"]["decisions"].update(
        {name: ["float", None, None, ""] for name in content["plan"]["decisions"]}
    ),
    "decision's row": lambda content, _: content["plan"]["decisions"].update(
        {name: ["int8", 3, None, ""] for name in content["plan"]["decisions"]}
    ),
    "region of no nodes": plan("regions", [["conv2d", [], []]]),
    "region of other nodes": plan("regions", [["conv2d", ["nope"], []]]),
    "slot of no node": plan("specs", []),
    "spec": lambda content, _: content["plan"]["specs"][0][2].__setitem__("quant_max", 300),
    "spec's observer": lambda content, _: content["plan"]["specs"][0][2].__setitem__("observer", 3),
    "spec of another field": lambda content, _: content["plan"]["specs"][0][2].__setitem__("evil", 3),
    "group": lambda content, _: content["plan"]["groups"][0].__setitem__(2, "x"),
    "fixed": plan("fixed", [[0, "1", None]]),
    "fusion": plan("fusions", [["fold", 1, 2, 3]]),
    "origins": plan("origins", {"x": [1, 2]}),
    "containers": plan("containers", [1]),
    "untraceable": plan("untraceable", {"a": 1}),
    "attributes": plan("attributes", [1]),
    "scale is text": quantize_argument(1, "x"),
    "scale is zero": quantize_argument(1, 0.0),
    "scale is negative": quantize_argument(1, -0.5),
    "scale is infinite": quantize_argument(1, float("inf")),
    "scale is nan": quantize_argument(1, float("nan")),
    "zero_point is large": quantize_argument(2, 2**62),
    "zero_point is real": quantize_argument(2, 0.5),
    "bounds": quantize_argument(3, -1),
    "empty bounds": quantize_argument(3, 255),
    "integers of 64 bits": quantize_argument(5, {"dtype": "int64"}),
    "an argument more": lambda content, _: node(content, "call_function", "fxq:quantize")["args"]["tuple"].append(1),
}


@pytest.mark.parametrize("edit", MALFORMED.values(), ids=MALFORMED)
def test_malformed(edit: Edit, forged: Callable[[Edit], Path]) -> None:
    with pytest.raises(FileFormatError, match=r"forged\.fxq: "):
        fxq.load_reference(forged(edit))


ADDED = {"described"}  # since files of this version were first written, which are read without


def test_files_from_before_a_key_was_added_are_read(forged: Callable[[Edit], Path], honest: bytes) -> None:
    assert opened(honest)[0]["regions"][""]["plan"].keys() > ADDED
    for key in ADDED:
        loaded = fxq.load_reference(forged(lambda c, _, key=key: c["plan"].pop(key)))
        assert getattr(loaded.plan, key) == {}


def test_any_key_may_be_missing_or_of_another_type(forged: Callable[[Edit], Path], honest: bytes) -> None:
    content = opened(honest)[0]["regions"][""]
    for key in content["plan"]:
        if key not in ADDED:
            with pytest.raises(FileFormatError):
                fxq.load_reference(forged(lambda c, _, key=key: c["plan"].pop(key)))
        for wrong in (7, None, "x", [[[]]]):
            if key in ("backend", "model") and wrong == "x":
                continue
            with pytest.raises(FileFormatError):
                fxq.load_reference(forged(plan(key, wrong)))
    for key in content["nodes"][0]:
        with pytest.raises(FileFormatError):
            fxq.load_reference(forged(lambda c, _, key=key: c["nodes"][2].pop(key)))


def test_arguments_that_no_kernel_takes(forged: Callable[[Edit], Path]) -> None:
    def edit(content: Content, _: Any) -> None:
        args = node(content, "call_function", "op:conv2d")["args"]["tuple"]
        args[3:] = ["one", {"tuple": [1, 1]}, 1, "groups"]

    with pytest.raises(FileFormatError, match=r"forged\.fxq: its graph cannot be lowered"):
        fxq.load(forged(edit))


PICKLED_CALL = b"\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00idq\x01\x85q\x02R."


@pytest.mark.parametrize("payload", [b"", b"PK\x03\x04", PICKLED_CALL])
def test_another_archive(payload: bytes, honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "forged.fxq"
    path.write_bytes(honest[:8] + hashlib.sha256(payload).digest() + payload)
    with pytest.raises(FileFormatError, match="malformed"):
        fxq.load(path)


PARTS = ["a reason", {}, 0, False]


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.clear(),
        lambda content: content.pop("partition"),
        lambda content: content.update(regions={}),
        lambda content: content.update(regions=[content["regions"]]),
        lambda content: content.update(regions={"": 1}),
        lambda content: content.update(regions={"a": content["regions"][""]}),
        lambda content: content.update(partition=PARTS, model="Net"),
        lambda content: content.update(partition=PARTS, regions={}, model="Net"),
        lambda content: content.update(partition=PARTS, regions={"a": content["regions"][""]}),
        lambda content: content.update(partition=7, regions={"a": content["regions"][""]}, model="Net"),
    ],
)
def test_graphs_that_are_not_at_their_places(edit: Callable[[Content], Any], honest: bytes, tmp_path: Path) -> None:
    """Whoever reads them, so that the command line does not stay silent."""
    content, tensors = opened(honest)
    edit(content)
    path = tmp_path / "forged.fxq"
    path.write_bytes(closed(content, tensors))
    for read in (fxq.load, fxq.load_reference, load_regions, load_for_tables):
        with pytest.raises(FileFormatError, match=r"forged\.fxq: its content is malformed"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"content": "{}"},
        *(
            {"content": text, "tensors": {}, "digest": hashlib.sha256(str(text).encode()).hexdigest()}
            for text in (1, "[]", "{}", '{"regions": [')
        ),
    ],
)
def test_another_content(content: Any, honest: bytes, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    test_another_archive(buffer.getvalue(), honest, tmp_path)


def with_payload(payload: bytes, path: Path) -> Path:
    path.write_bytes(with_header(payload))
    return path


def rewritten(data: bytes, compression: int = zipfile.ZIP_STORED, more: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """The archive of a file as another tool would write it."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data[HEADER:])) as old, zipfile.ZipFile(made, "w", compression) as new:
        for name, content in [*((m.filename, old.read(m)) for m in old.infolist()), *more]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a second member of one name
                new.writestr(name, content)
    return made.getvalue()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
        ({"more": [("archive/data.pkl", b"")]}, "two members of one name"),
        ({"more": [("archive/DATA.pkl", b"")]}, "two members of one name"),
        ({"more": [("archive/constants.pkl", b"")]}, "is of TorchScript"),
    ],
)
def test_archives_that_torch_save_does_not_write(
    options: dict[str, Any], message: str, honest: bytes, tmp_path: Path
) -> None:
    fxq.load(with_payload(rewritten(honest), tmp_path / "honest.fxq"))
    with pytest.raises(FileFormatError, match=rf"forged\.fxq: .*{message}"):
        fxq.load(with_payload(rewritten(honest, **options), tmp_path / "forged.fxq"))


def test_an_archive_that_claims_to_be_larger_than_the_file(honest: bytes, tmp_path: Path) -> None:
    payload = bytearray(honest[HEADER:])
    entry = payload.index(b"PK\x01\x02")
    payload[entry + 24 : entry + 28] = (1 << 31).to_bytes(4, "little")  # its size without compression
    with pytest.raises(FileFormatError, match="claims to hold more"):
        fxq.load(with_payload(payload, tmp_path / "forged.fxq"))


@pytest.mark.parametrize("one_dict", [True, False])
def test_many_names_of_one_tensor(one_dict: bool, honest: bytes, tmp_path: Path) -> None:
    """Little to read, and much to verify."""
    content, tensors = opened(honest)
    large = torch.zeros(10_000)
    names = {f"{number}": large for number in range(100)}
    tensors |= {"more": names} | ({"shared": names} if one_dict else {})
    path = tmp_path / "forged.fxq"
    path.write_bytes(closed(content, tensors))
    with pytest.raises(FileFormatError, match="two sections" if one_dict else "many times larger than the file"):
        fxq.load(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 2).to_sparse_csr, lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)],
)
def test_torch_says_nothing_about_what_is_refused(
    tensor: Callable[[], torch.Tensor], honest: bytes, tmp_path: Path
) -> None:
    content, tensors = opened(honest)
    path = tmp_path / "forged.fxq"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors["tensors "]["more"] = tensor()
        path.write_bytes(closed(content, tensors))
    with pytest.raises(FileFormatError, match="'more' is no plain tensor"):
        fxq.load(path)


def test_values_round_trip() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for index in [(slice(None), Ellipsis, None), (slice(1, None, 2), 3), (x, slice(x, None, None))]:
        graph.call_function(operator.getitem, (x, index))
    graph.call_function(torch.clamp, (x,), {"min": float("-inf"), "max": 0.1 + 0.2})
    graph.call_function(torch.zeros, ([2, 3],), {"dtype": torch.int8, "device": torch.device("cpu")})
    graph.call_method("contiguous", (x,), {"memory_format": torch.channels_last})
    graph.output({"a": x, "b": (x, [x, "text", True, None])})
    again = decode_graph(json.loads(json.dumps(encode_graph(graph))), ())
    assert [n.format_node() for n in again.nodes] == [n.format_node() for n in graph.nodes]
    assert [(n.args, n.kwargs).__repr__() for n in again.nodes] == [(n.args, n.kwargs).__repr__() for n in graph.nodes]
    assert [n.target for n in again.nodes] == [n.target for n in graph.nodes]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda g, x: g.call_function(print, (x,)), r"node 'print_1' calls .*print"),
        (lambda g, x: g.call_method("backward", (x,)), r"node 'backward' calls the method 'backward'"),
        (lambda g, x: g.call_function(getattr, (x, "grad_fn")), r"node 'getattr_1' reads the attribute 'grad_fn'"),
        (lambda g, x: g.call_function(torch.add, (x, 1j)), r"node 'add' has an argument of type complex"),
    ],
)
def test_what_a_file_cannot_hold(build: Callable[[torch.fx.Graph, torch.fx.Node], Any], message: str) -> None:
    graph = torch.fx.Graph()
    build(graph, graph.placeholder("x"))
    with pytest.raises(FxqError, match=message):
        encode_graph(graph)
