"""Models by name: what loads, and what each mistake says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxq.errors import ConfigError, FileFormatError, FxqError, MissingDependencyError
from fxq.models import load_model, preprocessing
from fxq.torchvision_ops import import_torchvision

MODEL_FILE = """
import torch
from torch import nn

not_callable = 3

def make_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

def make_number():
    return 3

def broken():
    raise ValueError("no such thing")
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module in the current directory, of a name no other test uses."""
    name = f"user_net_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(MODEL_FILE)
    monkeypatch.chdir(tmp_path)
    return name


# --- torchvision names ---


def test_a_torchvision_model_in_eval_mode() -> None:
    model = load_model("squeezenet1_1")
    assert type(model).__name__ == "SqueezeNet"
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["googlenet", "fcn_resnet50"])
@pytest.mark.filterwarnings("error")
def test_models_that_would_warn_or_download(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_download(*args: object, **kwargs: object) -> None:
        pytest.fail("tried to download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_download)
    assert isinstance(load_model(name), nn.Module)


def test_unknown_model_says_what_was_close() -> None:
    with pytest.raises(ConfigError, match=r"no model 'resnet81'.*resnet18"):
        load_model("resnet81")


def test_unknown_model_like_no_other() -> None:
    with pytest.raises(ConfigError, match=r"no model '#'; a model of your own is named as package.module:callable"):
        load_model("#")


def test_missing_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingDependencyError, match=r"fxq\[vision\]"):
        load_model("resnet18")


# --- weights ---


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_named_weights_are_loaded(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torchvision's own loading code; only the download is replaced."""
    torch.manual_seed(0)
    models = import_torchvision().models
    state = models.squeezenet1_1(weights=None).state_dict()
    monkeypatch.setattr(f"{models._api.__name__}.load_state_dict_from_url", lambda *args, **kwargs: state)
    assert_same_state(load_model("squeezenet1_1", weights).state_dict(), state)


def test_failed_download_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    models = import_torchvision().models
    monkeypatch.setattr(f"{models._api.__name__}.load_state_dict_from_url", no_network)
    with pytest.raises(FxqError, match=r"could not download the weights DEFAULT of resnet18 \(no network\)"):
        load_model("resnet18", "DEFAULT")


def test_unknown_weights_list_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no weights 'IMAGENET1K_V9'.*IMAGENET1K_V1, DEFAULT"):
        load_model("resnet18", "IMAGENET1K_V9")


@pytest.mark.parametrize("path", ["missing.pt", "folder/missing"])
def test_a_missing_file_is_not_taken_for_a_name(path: str) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_model("resnet18", path)


def test_state_dict_file(tmp_path: Path) -> None:
    state = load_model("squeezenet1_1").state_dict()
    torch.save(state, tmp_path / "weights.pt")
    assert_same_state(load_model("squeezenet1_1", str(tmp_path / "weights.pt")).state_dict(), state)


def test_state_dict_of_another_model_names_the_keys(tmp_path: Path) -> None:
    state = load_model("squeezenet1_1").state_dict()
    state["extra"] = torch.zeros(1)
    del state["features.0.bias"]
    state["classifier.1.bias"] = torch.zeros(10)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ConfigError) as caught:
        load_model("squeezenet1_1", str(tmp_path / "weights.pt"))
    message = str(caught.value)
    assert "features.0.bias missing" in message
    assert "extra unexpected" in message
    assert "classifier.1.bias is [10] instead of [1000] of another shape" in message


def test_many_wrong_keys_stay_one_line(tmp_path: Path) -> None:
    torch.save(load_model("squeezenet1_1").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError) as caught:
        load_model("resnet18", str(tmp_path / "weights.pt"))
    assert "and" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"weights\.pt"):
        load_model("squeezenet1_1", str(tmp_path / "weights.pt"))


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "model.pt")
    with pytest.raises(FileFormatError, match="not a state dict"):
        load_model("squeezenet1_1", str(tmp_path / "model.pt"))


def test_a_tensor_is_not_a_state_dict(tmp_path: Path) -> None:
    torch.save(torch.zeros(1), tmp_path / "tensor.pt")
    with pytest.raises(FileFormatError, match=r"torch\.save\(model\.state_dict\(\), path\)"):
        load_model("squeezenet1_1", str(tmp_path / "tensor.pt"))


# --- package.module:callable ---


def test_a_callable_in_the_current_directory(user_module: str) -> None:
    path_before = list(sys.path)
    model = load_model(f"{user_module}:make_net")
    assert not model.training
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    assert sys.path == path_before


def test_a_callable_with_a_state_dict(user_module: str) -> None:
    state = load_model(f"{user_module}:make_net").state_dict()
    torch.save(state, "weights.pt")
    assert_same_state(load_model(f"{user_module}:make_net", "weights.pt").state_dict(), state)


@pytest.mark.parametrize(
    ("callable_name", "message"),
    [
        ("make_nte", "has no callable 'make_nte' .did you mean make_net"),
        ("not_callable", "has no callable 'not_callable'"),
        ("make_number", "returned int, not a torch.nn.Module"),
        ("broken", "raised ValueError: no such thing"),
        ("", "not of the form package.module:callable"),
    ],
)
def test_wrong_callables(user_module: str, callable_name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(f"{user_module}:{callable_name}")


def test_named_weights_need_a_torchvision_model(user_module: str) -> None:
    with pytest.raises(ConfigError, match="not a torchvision model"):
        load_model(f"{user_module}:make_net", "DEFAULT")


@pytest.mark.parametrize("module", ["no_such_module_here", "fxq.no_such_module_here"])
def test_unknown_module(module: str) -> None:
    with pytest.raises(ConfigError, match=f"no module '{module}'"):
        load_model(f"{module}:make")


def test_a_module_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_written_net.py").write_text("def f(:\n")
    (tmp_path / "needing_net.py").write_text("import no_such_module_here\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="importing half_written_net raised SyntaxError"):
        load_model("half_written_net:f")
    with pytest.raises(MissingDependencyError, match="needing_net needs 'no_such_module_here'"):
        load_model("needing_net:f")


# --- preprocessing ---


def image(width: int = 300, height: int = 200) -> object:
    return pytest.importorskip("PIL.Image").new("RGB", (width, height), (255, 128, 0))


def test_imagenet_preprocessing_by_default() -> None:
    tensor = preprocessing("resnet18")(image())
    assert tensor.shape == (3, 224, 224)
    assert tensor[0, 0, 0].item() == pytest.approx((1 - 0.485) / 0.229)
    assert tensor[2, 0, 0].item() == pytest.approx(-0.406 / 0.225)


@pytest.mark.parametrize("weights", [None, "DEFAULT"])
def test_preprocessing_to_a_size(weights: str | None) -> None:
    assert preprocessing("resnet18", weights, size=64)(image()).shape == (3, 64, 64)


def test_the_weights_bring_their_own_preprocessing() -> None:
    assert preprocessing("inception_v3", "DEFAULT")(image()).shape == (3, 299, 299)


def test_segmentation_presets_do_not_crop() -> None:
    assert preprocessing("fcn_resnet50", "DEFAULT", size=56)(image()).shape == (3, 64, 96)


def test_detection_presets_take_no_size() -> None:
    assert preprocessing("ssdlite320_mobilenet_v3_large", "DEFAULT", size=56)(image()).shape == (3, 200, 300)


def test_preprocessing_refuses_mistakes() -> None:
    with pytest.raises(ConfigError, match="size 0"):
        preprocessing("resnet18", size=0)
    with pytest.raises(ConfigError, match="no weights 'X'"):
        preprocessing("resnet18", "X")


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
