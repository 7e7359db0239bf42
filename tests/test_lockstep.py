"""Both graphs node by node: the values are those of running each graph, and what is changed on the way is seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import Lambda, Two, batches, conv, interpreted
from torch import nn

import fxq
from fxq.errors import CalibrationError, StageError
from fxq.lockstep import lockstep, region_inputs, samples_in
from fxq.partition import regions_of
from fxq.qdq import is_quantize


def net():
    def forward(m, x):
        y = torch.relu(m.bn(m.a(x)))
        z = m.b(y) + y  # read twice
        u, v = z.chunk(2, 1)
        return {"scores": m.fc(torch.cat([v, u], 1).mean((2, 3))), "map": torch.sigmoid(z)}

    return Lambda(forward, a=conv(), bn=nn.BatchNorm2d(4), b=conv(4, 4), fc=nn.Linear(4, 5))


def both(model, data, **options) -> tuple[nn.Module, nn.Module]:
    prepared = fxq.prepare(model, data[0], **options)
    fxq.calibrate(prepared, data)
    return prepared, fxq.convert_to_reference(prepared)


def test_values_are_those_of_the_two_graphs():
    data = [*batches(), torch.randn(1, 3, 8, 8)]
    prepared, reference = both(net(), data)
    floats, ints = ([interpreted(module, batch) for batch in data] for module in (prepared, reference))
    names = []
    for step in lockstep(reference, prepared, region_inputs(prepared, data, samples=100)[""]):
        names.append(step.node.name)
        for batch, (expected, actual) in enumerate(zip(step.expected, step.actual, strict=True)):
            torch.testing.assert_close(expected, floats[batch][step.node.name], rtol=0, atol=0)
            torch.testing.assert_close(actual, ints[batch][step.node.name], rtol=0, atol=0)
    assert {"a", "b", "add", "chunk", "cat", "fc", "sigmoid"} <= set(names)
    assert not any(is_quantize(node) for node in reference.graph.nodes if node.name in names)


def test_a_changed_constant_is_seen_by_all_that_follows():
    data = batches()
    prepared, reference = both(net(), data)
    for step in lockstep(reference, prepared, region_inputs(prepared, data, samples=100)[""]):
        if step.node.name == "b":
            before = step.actual[0]
            reference.b.bias.data += 0.5
            step.rerun()
            torch.testing.assert_close(step.actual[0], before + 0.5)
            torch.testing.assert_close(F.conv2d(*step.arguments(0)), step.actual[0])
        last = step.actual[1] if step.node.name == "fc" else None
        if last is not None:
            assert torch.equal(last, interpreted(reference, data[1])["fc"])
            break
    else:
        pytest.fail("the last layer was not reached")


def test_observers_record_nothing():
    data = batches()
    prepared, reference = both(net(), data)
    counts = {name: module.batches for name, module in prepared.named_modules() if hasattr(module, "batches")}
    for _ in lockstep(reference, prepared, region_inputs(prepared, data, samples=100)[""]):
        pass
    assert counts == {name: module.batches for name, module in prepared.named_modules() if hasattr(module, "batches")}
    prepared(data[0])
    assert any(module.batches > counts[name] for name, module in prepared.named_modules() if name in counts)


def test_samples_end_with_the_batch_that_reaches_them():
    data = batches(count=5)
    prepared, _ = both(net(), data)
    taken = iter(data)
    assert len(region_inputs(prepared, taken, samples=3)[""]) == 2
    assert len(list(taken)) == 3


def test_two_inputs_by_keyword_and_by_forward_fn():
    model = Two(lambda m, x, y: m.a(x) + m.a(y), a=conv())
    x, y = batches()
    prepared, reference = both(model, [(x, y)])

    def forward_fn(m, batch):
        return m(y=batch[1], x=batch[0])

    for inputs in (
        region_inputs(prepared, [{"x": x, "y": y}], samples=1),
        region_inputs(prepared, [(x, y)], samples=1, forward_fn=forward_fn),
    ):
        last = [list(step.actual) for step in lockstep(reference, prepared, inputs[""])][-1]
        assert torch.equal(last[0], interpreted(reference, x, y)["add"])


class Loops(nn.Module):
    """Cannot be traced as a whole; calls its head once for each scale, and writes into what the head was given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(), nn.ReLU())
        self.head = nn.Sequential(conv(4, 4), nn.ReLU())

    def forward(self, x):
        y, found = self.body(x), []
        while y.shape[-1] > 2 and bool(y.mean() > -1):
            found.append(self.head(y))
            y = F.avg_pool2d(y, 2)
            y += 1
        return found


def test_regions_get_the_inputs_of_each_call():
    data = batches()
    prepared, reference = both(Loops().eval(), data)
    calls = region_inputs(prepared, data, samples=100)
    assert calls.keys() == {"body", "head"}
    assert [args[0].shape[-1] for args, _ in calls["head"]] == [8, 4, 8, 4]
    for path, region in regions_of(reference).items():
        steps = list(step.actual for step in lockstep(region, regions_of(prepared)[path], calls[path]))
        assert len(steps[0]) == len(calls[path])


def test_empty_data_and_wrong_stage():
    prepared, reference = both(net(), batches())
    with pytest.raises(CalibrationError, match="empty"):
        region_inputs(prepared, [], samples=1)
    with pytest.raises(StageError, match="prepared one is needed"):
        region_inputs(reference, batches(), samples=1)


@pytest.mark.parametrize(
    ("batch", "count"),
    [(torch.zeros(5, 2), 5), ((torch.zeros(3), 1), 3), ({"x": torch.zeros(2, 2)}, 2), (torch.tensor(1.0), 1), ("x", 1),
     ((None, torch.zeros(4)), 4), ((torch.tensor(0.5), torch.zeros(3)), 3), (((), {"x": torch.zeros(2, 2)}), 2)],
)  # fmt: skip
def test_samples_in_a_batch(batch, count):
    assert samples_in(batch) == count
