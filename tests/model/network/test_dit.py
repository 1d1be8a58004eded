"""If this fails, ours is compared with something else than DiT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.dit_config import DiTConfig
from model.network.dit import DiT, dit_macs, transformer_fields
from model.network.kinds import describe_network, network_parameters

TINY: dict[str, Any] = {
    "sample_size": 8,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_classes": 5,
}


@pytest.fixture(scope="module")
def network() -> DiT:
    """With random weights, modulations included."""
    torch.manual_seed(0)
    network = DiT(**TINY).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(std=0.3)
    return network


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.tensor([0.0, 500.0, 999.0]), torch.tensor([0, 3, 5])


@pytest.mark.parametrize(
    ("preset", "millions", "gmacs"),
    [("S/2", 33, 6.06), ("B/2", 130, 23.01), ("L/2", 458, 80.71), ("XL/2", 675, 118.64)],
)
def test_sizes_are_those_of_table_2(preset: str, millions: float, gmacs: float) -> None:
    config = DiTConfig.preset(preset)
    size = describe_network(config)
    assert size["gmacs"] == pytest.approx(gmacs, rel=1e-3)
    assert (size["paper"]["parameters_millions"], size["paper"]["gmacs"]) == (millions, gmacs)
    # The fixed table of positions, which DiT's code counts.
    position_table = config.num_tokens * config.hidden_size
    assert (size["parameters"] + position_table) / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize("side", [32, 64])
def test_dit_macs_meet_dits_paper(side: int) -> None:
    published = {32: 118.64e9, 64: 524.60e9}[side]
    assert dit_macs(DiTConfig.preset("XL/2", sample_size=side))["total"] == pytest.approx(published, rel=2e-4)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_dit_macs_equal_the_operations_of_a_forward(patch_size: int) -> None:
    config = DiTConfig(**TINY | {"patch_size": patch_size})
    with torch.device("meta"):
        network = DiT(**TINY | {"patch_size": patch_size}).eval()
        inputs = torch.empty(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    assert counter.get_total_flops() == 2 * dit_macs(config)["total"]


def test_forward_equals_diffusers_with_the_same_embedding_in_each_block(network: DiT) -> None:
    x, t, labels = _inputs()
    peer = DiTTransformer2DModel(**transformer_fields(network.architecture), num_embeds_ada_norm=5).eval()
    _, unexpected = peer.load_state_dict(network.transformer.state_dict(), strict=False)
    assert not unexpected

    class Embedded(torch.nn.Module):
        def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: Any = None) -> Tensor:
            return network.timestep_embed(timestep) + network.label_embed(class_labels)

    for block in peer.transformer_blocks:
        block.norm1.emb = Embedded()
    with torch.no_grad():
        expected = peer(x, timestep=t, class_labels=labels).sample
    sample = network(x, t, labels).sample
    assert sample.shape == (3, 8, 8, 8)
    assert expected.std() > 0.1
    assert torch.equal(sample, expected)


def test_null_labels_of_ours_and_of_diffusers_mean_no_class(network: DiT) -> None:
    x, t, _ = _inputs()
    samples = [network(x, t, labels).sample for labels in (torch.full((3,), 5), torch.full((3,), 1000), None)]
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])
    with pytest.raises(ValueError, match="class_labels: 6 given; this network accepts 0 to 4"):
        network(x, t, torch.tensor([0, 1, 6]))


def test_initial_weights_are_those_of_dits_code() -> None:
    """The output is 0, as are all modulations; queries, keys and values are one xavier map of d to 3d."""
    torch.manual_seed(0)
    network = DiT(**TINY | {"hidden_size": 64}).requires_grad_(False)
    x, t, labels = _inputs()
    assert not network.eval()(x, t, labels).sample.any()
    for block in network.transformer.transformer_blocks:
        assert not block.norm1.linear.weight.any()
        assert not block.attn1.to_q.bias.any()
        bounds = {block.attn1.to_k: (6 / 256) ** 0.5, block.attn1.to_out[0]: (6 / 128) ** 0.5}
        for linear, bound in bounds.items():
            assert 0.95 * bound < linear.weight.abs().max() <= bound
    assert float(network.label_embed.embedding.weight.std()) == pytest.approx(0.02, rel=0.2)
    assert network_parameters(network.architecture) == sum(p.numel() for p in network.parameters())


def test_blocks_add_up_in_fp32_under_autocast(network: DiT) -> None:
    dtypes: list[torch.dtype] = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        for block in network.transformer.transformer_blocks
    ]
    with torch.autocast("cpu", torch.bfloat16):
        network(*_inputs())
    for hook in hooks:
        hook.remove()
    assert dtypes == [torch.float32] * TINY["num_layers"]
