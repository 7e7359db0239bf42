"""Models whose one input is a list of tensors, as the pathways of a video model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxq
from fxq.errors import CalibrationError, InputError
from fxq.graph_module import QuantModule
from fxq.numerics import sqnr
from fxq.partition import regions_of


class Pathways(nn.Module):
    """One conv for each member of a list, which it insists on."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)])

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        assert isinstance(x, list), "needs a list"
        for number, stem in enumerate(self.stems):
            x[number] = stem(x[number]).relu()
        return x


class TwoPathways(nn.Module):
    """Pathways of other sizes, whose averages are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.pathways, self.head = Pathways(), nn.Linear(12, 5)

    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        return self.head(torch.cat([y.mean((2, 3)) for y in self.pathways(x)], 1))


class Branching(TwoPathways):
    """Cannot be traced as a whole."""

    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        y = torch.cat([y.mean((2, 3)) for y in self.pathways(x)], 1)
        return self.head(y if y.sum() > -1e9 else -y)


class Either(nn.Module):
    """Takes a tensor or a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        return self.conv(torch.cat(x) if isinstance(x, list) else x)


def pair(seed: int, number: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(number, 3, 8, 8, generator=generator), torch.rand(number, 3, 16, 16, generator=generator)]


def seeded(model: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model().eval()


def close(model: nn.Module, qmodel: nn.Module) -> bool:
    with torch.no_grad():
        return sqnr(model(pair(9)), qmodel(pair(9))) > 25


DATA = {
    "lists": [pair(1), pair(2)],
    "tuples of one": [(pair(1),), (pair(2),)],
    "with labels": [(pair(1), torch.zeros(4)), (pair(2), torch.zeros(4))],
    "with labels, as a DataLoader collates": [[pair(1), torch.zeros(4)], [pair(2), torch.zeros(4)]],
}


@pytest.mark.parametrize("name", DATA)
def test_a_list_is_traced_as_a_whole(name: str) -> None:
    model = seeded(TwoPathways)
    qmodel = fxq.quantize(model, DATA[name], calibration="simple", progress=False)
    assert list(regions_of(qmodel)) == [""] and not qmodel.plan.untraceable
    assert "convs and linears in int8     3 of 3" in fxq.summary(qmodel)
    assert close(model, qmodel)


@pytest.mark.parametrize("name", DATA)
def test_a_list_in_regions(name: str) -> None:
    model = seeded(Branching)
    qmodel = fxq.quantize(model, DATA[name], calibration="simple", progress=False)
    assert len(regions_of(qmodel)) > 1
    assert close(model, qmodel)


@pytest.mark.parametrize("model", [TwoPathways, Branching])
@pytest.mark.parametrize("example", [pair(1), (pair(1),)])
def test_example_inputs_and_steps(model: type[nn.Module], example: object) -> None:
    model = seeded(model)
    prepared = fxq.prepare(model, example, calibration="simple")
    fxq.calibrate(prepared, [pair(1), (pair(2),), [pair(3), torch.zeros(4)]])
    assert close(model, fxq.convert(prepared))
    assert close(model, fxq.quantize(model, [pair(1)], example_inputs=example, calibration="simple", progress=False))


def test_what_reads_data_again() -> None:
    model = seeded(TwoPathways)
    qmodel = fxq.quantize(model, [pair(1), pair(2)], calibration="advanced", target="sqnr:20", progress=False)
    assert close(model, qmodel)
    assert fxq.compare_records(model, qmodel, [pair(3)])
    assert fxq.sensitivity_records(model, [pair(3)], progress=False)


def test_files_and_frozen_models() -> None:
    model = seeded(TwoPathways)
    qmodel = fxq.quantize(model, [pair(1)], progress=False)
    frozen = fxq.freeze(qmodel, pair(1), form="torchscript")
    assert torch.equal(frozen(pair(1)), qmodel(pair(1)))


def test_a_file(tmp_path) -> None:
    qmodel = fxq.quantize(seeded(TwoPathways), [pair(1)], progress=False)
    fxq.save(qmodel, tmp_path / "model.fxq")
    assert torch.equal(fxq.load(tmp_path / "model.fxq")(pair(5)), qmodel(pair(5)))


def test_another_length_is_refused() -> None:
    qmodel = fxq.quantize(seeded(TwoPathways), [pair(1)], progress=False)
    with pytest.raises(InputError, match="x had 2 members when the model was traced"):
        qmodel([*pair(1), *pair(2)])


def test_lists_of_any_length_stay_so() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
            return self.conv(torch.stack(images))

    qmodel = fxq.quantize(seeded(Stacked), [[*torch.rand(2, 3, 8, 8)]], progress=False)
    assert isinstance(qmodel, QuantModule)
    assert qmodel([*torch.rand(5, 3, 8, 8)]).shape[0] == 5


def test_labels_stay_labels() -> None:
    """A list of an image and a float target, as a DataLoader collates them for super-resolution."""
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = nn.Conv2d(3, 4, 3, padding=1).eval()
    loader = DataLoader(TensorDataset(images, images * 2), batch_size=4)
    assert isinstance(next(iter(loader)), list)
    qmodel = fxq.quantize(model, loader, progress=False)
    assert sqnr(model(images).detach(), qmodel(images)) > 30


def test_what_cannot_be_told_is_an_error() -> None:
    model, x = seeded(Either), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with pytest.raises(CalibrationError, match="takes the list as well as its first member"):
        fxq.quantize(model, [[x, x]], progress=False)
    assert isinstance(fxq.quantize(model, [(x, x)], progress=False), QuantModule)
    assert isinstance(fxq.quantize(model, [[x]], progress=False), QuantModule)
    fxq.quantize(model, [([x, x],)], progress=False)([x, x])


def test_forward_fn_gets_batches_as_they_are() -> None:
    model = seeded(TwoPathways)
    qmodel = fxq.quantize(
        model, [pair(1)], example_inputs=pair(1), forward_fn=lambda m, batch: m(list(batch)), progress=False
    )
    assert close(model, qmodel)


def test_the_users_list_is_not_written_to() -> None:
    given = pair(1)
    before = list(given)
    fxq.quantize(seeded(TwoPathways), [given], progress=False)(given)
    assert all(a is b for a, b in zip(given, before, strict=True))
