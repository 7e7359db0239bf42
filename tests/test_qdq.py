"""The conversions of reference graphs round as runtimes and kernels do."""

from __future__ import annotations

import pytest
import torch

from fxq.qdq import QUANTIZE, QUANTIZE_AVERAGE


def test_quantize_average_takes_what_is_next_to_a_half_for_one() -> None:
    near = torch.tensor([0.5, 1.5, 2.5, 0.50005, 0.49995, 1.49995, 1.5003, 2.4997, 300.0, -9.0])
    got = QUANTIZE_AVERAGE(near, 1.0, 0, 0, 255, torch.uint8)
    assert got.tolist() == [0, 2, 2, 0, 0, 2, 2, 2, 255, 0]


@pytest.mark.parametrize("scale", [0.0296841, 1 / 256, 1 / 255])
@pytest.mark.parametrize("zero_point", [0, 134, 135])
def test_quantize_is_that_of_onnxruntime_to_the_last_bit(scale: float, zero_point: int) -> None:
    """Ties and what is next to them included; torch's kernels are one off for a few of them."""
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    scale = float(torch.tensor(scale))
    noise = torch.randn(200_003, generator=torch.Generator().manual_seed(0))
    x = torch.cat([noise, (torch.arange(-99, 99) + 0.5) * scale])
    found = QUANTIZE(x, scale, zero_point, 0, 255, torch.uint8)
    make, kinds = onnx.helper, onnx.TensorProto
    graph = make.make_graph(
        [make.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "quantize",
        [make.make_tensor_value_info("x", kinds.FLOAT, [len(x)])],
        [make.make_tensor_value_info("y", kinds.UINT8, [len(x)])],
        [make.make_tensor("scale", kinds.FLOAT, [], [scale]), make.make_tensor("zero", kinds.UINT8, [], [zero_point])],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert torch.equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), found)
    kernel = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8).int_repr().int()
    assert (kernel - found.int()).abs().max() <= 1
