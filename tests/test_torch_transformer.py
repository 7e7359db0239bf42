"""torch's own transformer layers: int8 inside, float semantics with every kind of mask, any length and batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxq
from fxq.numerics import sqnr
from fxq.partition import regions_of
from fxq.tracing import trace

WIDTH, LENGTH = 32, 10


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # norms and biases start as ones and zeros
        nn.init.normal_(parameter, 0.1, 0.1) if parameter.dim() == 1 else None
    return model


def encoder(batch_first=True, **options):
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=batch_first, **options)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
PADDING = torch.arange(LENGTH).expand(3, LENGTH) >= torch.tensor([[10], [7], [4]])


def int8_share(qmodel):
    records = fxq.graph_records(qmodel)
    return sum(r["macs"] for r in records if r["type"] == "int8") / sum(r["macs"] for r in records)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    "masks",
    [{}, {"src_mask": CAUSAL}, {"src_mask": CAUSAL < 0}, {"src_key_padding_mask": PADDING},
     {"src_mask": CAUSAL, "src_key_padding_mask": PADDING}],
    ids=["none", "float", "bool", "padding", "both"],
)  # fmt: skip
def test_an_encoder_layer_is_traced_exactly(norm_first, activation, masks):
    layer = seeded(
        lambda: nn.TransformerEncoderLayer(WIDTH, 4, 64, norm_first=norm_first, activation=activation, batch_first=True)
    )
    x = noise(3, LENGTH, WIDTH)
    prepared = fxq.prepare(layer, {"src": x, **masks})
    torch.testing.assert_close(prepared(x, **masks), layer(x, **masks), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_becomes_int8(batch_first, masked):
    model = seeded(lambda: encoder(batch_first))
    kwargs = {"mask": CAUSAL, "src_key_padding_mask": PADDING} if masked else {}
    shape = (3, LENGTH, WIDTH) if batch_first else (LENGTH, 3, WIDTH)
    batches = [{"src": noise(*shape, seed=seed), **kwargs} for seed in range(3)]
    qmodel = fxq.quantize(model, batches[:2])
    assert int8_share(qmodel) == 1.0
    with torch.no_grad():
        assert sqnr(model(**batches[2]), qmodel(**batches[2])) > 25
        if not masked:
            other = noise(5, 7, WIDTH, seed=9)
            assert sqnr(model(other), qmodel(other)) > 25


def test_an_encoder_inside_a_model_and_a_decoder():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder()
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, 64, batch_first=True), 2)
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, x, y):
            return self.head(self.decoder(y, self.encoder(x)))

    model = seeded(Model)
    batches = [{"x": noise(2, LENGTH, WIDTH, seed=s), "y": noise(2, 6, WIDTH, seed=s + 9)} for s in range(3)]
    qmodel = fxq.quantize(model, batches[:2])
    assert list(regions_of(qmodel)) == [""] and int8_share(qmodel) == 1.0
    with torch.no_grad():
        assert sqnr(model(**batches[2]), qmodel(**batches[2])) > 25


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_whole_transformer(batch_first):
    model = seeded(lambda: nn.Transformer(WIDTH, 4, 1, 1, 64, batch_first=batch_first))

    def batch(seed):
        shape = (2, LENGTH, WIDTH) if batch_first else (LENGTH, 2, WIDTH)
        return {"src": noise(*shape, seed=seed), "tgt": noise(*shape, seed=seed + 9), "tgt_mask": CAUSAL}

    qmodel = fxq.quantize(model, [batch(0), batch(1)])
    assert int8_share(qmodel) > 0.95
    with torch.no_grad():
        assert sqnr(model(**batch(2)), qmodel(**batch(2))) > 25


def test_tracing_leaves_the_fused_kernel_as_it_was():
    before = torch.backends.mha.get_fastpath_enabled()
    trace(encoder().eval(), (noise(1, LENGTH, WIDTH),), {})
    assert torch.backends.mha.get_fastpath_enabled() is before
