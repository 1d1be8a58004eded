"""If this fails, weights of the authors' code make other pictures here, or a network cannot be saved,
compiled or shared between requests as the rest of the project takes for granted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.config import LaMambaConfig
from model.diffusion import guided_eps
from model.network.lamamba import LaMambaDiff
from model.network.residual import Residual
from model.network.scan import resolve_scan_backend
from tests.golden_networks import MAX_ABS, MAX_ABS_GUIDED, NETWORKS, activations, load_golden

TOLERANCE = {  # relative RMS of the output
    torch.float32: 2e-5,  # another batch size, another order of sums
    torch.bfloat16: 5e-2,  # 2**-9 a rounding, some 60 roundings in a row
}
BACKENDS = ("reference", "vectorized")
TINY = LaMambaConfig(sample_size=8, hidden_size=8, num_heads=2, window_size=4, num_classes=5)


def network_with_effects(config: LaMambaConfig = TINY) -> LaMambaDiff:
    """A network in eval mode whose modulations are not zero, so that label and timestep reach the output."""
    torch.manual_seed(0)
    network = LaMambaDiff(**dataclasses.asdict(config))
    for name, parameter in network.named_parameters():
        if ".modulation." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def inputs(rows: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, height, width, generator=generator)
    return latents, torch.arange(rows) * 300.5, torch.arange(rows)


def relative_rms(given: Tensor, expected: Tensor) -> float:
    given, expected = given.detach().double(), expected.detach().double()
    return float((given - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_equals_the_authors_code(name: str, backend: str) -> None:
    golden = load_golden(name)
    network = golden.build()
    network.use_scan_backend(resolve_scan_backend(backend))
    ours = activations(network, golden.inputs)
    checked = 0
    for key, expected in golden.tensors.items():
        if key == "out" or key.startswith("mid."):
            torch.testing.assert_close(
                ours[key.removeprefix("mid.")], expected, rtol=0, atol=MAX_ABS, msg=key
            )
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("name", ["xl-like", "no-attention", "unconditional"])
def test_forward_takes_the_conditioning_in_place_of_timestep_and_labels(name: str) -> None:
    network = load_golden(name).build()
    config = network.architecture
    latents = torch.randn(3, config.in_channels, config.sample_size, config.sample_size)
    timesteps, labels = (
        torch.tensor([0.0, 500.5, 999.0]),
        torch.tensor([0, 1, 2]).clamp_max(config.num_classes),
    )
    with torch.no_grad():
        conditioning = network.conditioning(timesteps, labels)
        expected = network(latents, timesteps, labels).sample
        assert torch.equal(network(latents, conditioning=conditioning).sample, expected)
        assert not torch.equal(network(latents, conditioning=conditioning.flip(0)).sample, expected)
    with pytest.raises(ValueError, match="timestep: none given; accepted is a timestep, or conditioning"):
        network(latents)


@pytest.mark.parametrize("name", NETWORKS)
def test_stacked_conditioning_is_the_conditioning(name: str) -> None:
    network = load_golden(name).build()
    names, num_bytes = (
        list(network.state_dict()),
        sum(p.untyped_storage().nbytes() for p in network.parameters()),
    )
    timesteps = torch.tensor([0.0, 500.5, 999.0])
    labels = torch.tensor([0, 1, 2]).clamp_max(network.architecture.num_classes)
    with torch.no_grad():
        expected = network.conditioning(timesteps, labels)
        network.stack_conditioning()
        torch.testing.assert_close(network.conditioning(timesteps, labels), expected, rtol=1e-5, atol=1e-5)
        assert list(network.state_dict()) == names
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage()
            for t in (*network.parameters(), *network.buffers())
        }
        geometry = sum(b.untyped_storage().nbytes() for b in network.geometries.buffers())
        assert sum(storage.nbytes() for storage in storages.values()) - geometry <= num_bytes
        # New values reach the stack.
        other = {key: value + 0.01 for key, value in network.state_dict().items()}
        network.load_state_dict(other)
        stacked = network.conditioning(timesteps, labels)
        network._conditioning_stack = None
        torch.testing.assert_close(stacked, network.conditioning(timesteps, labels), rtol=1e-5, atol=1e-5)


def test_guided_forward_equals_the_authors_code() -> None:
    golden = load_golden("xl-like")
    half = len(golden.tensors["cfg.x"]) // 2
    latents = torch.cat([golden.tensors["cfg.x"][:half]] * 2)
    with torch.no_grad():
        output = golden.build()(latents, golden.tensors["cfg.t"], golden.tensors["cfg.y"]).sample
    (eps_cond, eps_uncond), v = output[:, :4].chunk(2), output[:, 4:]
    eps = guided_eps(eps_cond, eps_uncond, torch.full((half,), 4.0))
    ours = torch.cat([torch.cat([eps, eps]), v], dim=1)
    torch.testing.assert_close(ours, golden.tensors["out_cfg"], rtol=0, atol=MAX_ABS_GUIDED)


def test_an_untrained_network_is_the_identity_in_each_block() -> None:
    torch.manual_seed(0)
    network = LaMambaDiff(**dataclasses.asdict(TINY)).eval()
    latents, _, _ = inputs()
    with torch.no_grad():
        first = network(latents, torch.tensor([0, 10, 999]), torch.tensor([0, 1, 2])).sample
        second = network(latents, torch.tensor([5, 700, 3]), torch.tensor([4, 5, 0])).sample
        tokens = torch.randn(1, 8, 8, 8)
        block = network.encoder[0][0]
        vectors = block.adaln_vectors(torch.randn(1, 32))
        unchanged = block(Residual(tokens), vectors, network.geometries["8x8/1"]).sum()
    assert torch.equal(first, second)
    assert torch.equal(unchanged, tokens)
    assert first.std() > 0.1  # unlike DiT's, the final linear map does not start at zero


def test_state_dict_has_no_derivable_buffer() -> None:
    network = network_with_effects()
    network(*inputs(1, 16, 8))
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize(
    ("label", "row"), [(0, 0), (4, 4), (5, 5), (1000, 5)], ids=["first", "last", "null", "null-of-diffusers"]
)
def test_class_labels_select_a_row_of_the_table(label: int, row: int) -> None:
    network = network_with_effects()
    expected = network.label_embed.embedding.weight[row]
    assert torch.equal(network.label_embed(torch.tensor([label]))[0], expected)
    latents, timestep, _ = inputs(1)
    assert torch.equal(
        network(latents, timestep, torch.tensor([label])).sample,
        network(latents, timestep, torch.tensor([row])).sample,
    )


def test_class_labels_of_none_are_the_null_class() -> None:
    network = network_with_effects()
    latents, timestep, _ = inputs(2)
    null = network(latents, timestep, torch.tensor([network.null_label] * 2)).sample
    assert torch.equal(network(latents, timestep).sample, null)


@pytest.mark.parametrize("label", [-1, 6, 999, 1001])
def test_class_labels_out_of_range_raise_before_the_network_runs(label: int) -> None:
    network = network_with_effects()
    network.timestep_embed.register_forward_hook(lambda *_: pytest.fail("the network ran"))
    latents, timestep, _ = inputs(1)
    with pytest.raises(ValueError, match=f"class_labels: {label} given; this network accepts 0 to 4"):
        network(latents, timestep, torch.tensor([label]))


def test_an_unconditional_network_ignores_labels() -> None:
    network = network_with_effects(dataclasses.replace(TINY, num_classes=0))
    latents, timestep, _ = inputs(2)
    assert torch.equal(
        network(latents, timestep).sample, network(latents, timestep, torch.tensor([7, 1000])).sample
    )


def test_forward_in_eval_mode_repeats_bit_for_bit() -> None:
    network = network_with_effects()
    assert torch.equal(network(*inputs()).sample, network(*inputs()).sample)


def test_forward_takes_a_scalar_timestep_and_returns_a_tuple_if_asked() -> None:
    network = network_with_effects()
    latents, _, labels = inputs()
    rows = network(latents, torch.full((3,), 250), labels).sample
    (scalar,) = network(latents, torch.tensor(250), labels, return_dict=False)
    assert torch.equal(scalar, rows)


def test_a_row_is_the_same_alone_and_in_a_crowd() -> None:
    network = network_with_effects()
    latents, timestep, labels = inputs(5)
    labels[4] = 1000
    crowd = network(latents, timestep, labels).sample
    for i in range(5):
        alone = network(latents[i : i + 1], timestep[i : i + 1], labels[i : i + 1]).sample
        assert relative_rms(crowd[i : i + 1], alone) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "size", [(4, 4), (8, 16), (16, 8), (4, 24), (24, 8)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_forward_takes_other_sizes_than_it_was_built_for(size: tuple[int, int]) -> None:
    network = network_with_effects(dataclasses.replace(TINY, window_size=2))
    sample = network(*inputs(2, *size)).sample
    assert sample.shape == (2, 8, *size)
    assert sample.isfinite().all()


def test_a_size_prepared_and_a_size_met_first_in_forward_agree() -> None:
    prepared, met = network_with_effects(), network_with_effects()
    prepared.prepare_grid(8, 16)
    assert torch.equal(prepared(*inputs(1, 8, 16)).sample, met(*inputs(1, 8, 16)).sample)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((6, 8), "multiples of 4"),
        ((8, 3), "multiples of 4"),
        ((12, 8), "sides up to 4"),
        ((4, 0), "multiples of 4"),
    ],
    ids=["rows", "columns", "windows", "nothing"],
)
def test_sizes_that_do_not_fit_are_refused(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"token grid: .* given; .*{message}"):
        network_with_effects().prepare_grid(*size)


def test_forward_compiles_without_graph_breaks() -> None:
    # Compiling costs seconds a block: few of them, and two scan directions.
    short = dataclasses.replace(
        TINY, depths=(2, 1, 1, 0), decoder_extra_block=False, vssm="vim", patch_size=2
    )
    network = network_with_effects(dataclasses.replace(short, sample_size=16))
    latents, timestep, labels = inputs(2, 16, 16)
    expected = network(latents, timestep, labels).sample
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(latents, timestep, labels).sample
    assert relative_rms(compiled, expected) < TOLERANCE[torch.float32]


def test_bf16_stays_close_to_fp32() -> None:
    golden = load_golden("s-like")
    network = golden.build()
    latents, timestep, labels = golden.inputs
    with torch.no_grad():
        sample = network.to(torch.bfloat16)(latents.bfloat16(), timestep, labels).sample
    assert sample.dtype == torch.bfloat16
    assert relative_rms(sample, golden.tensors["out"]) < TOLERANCE[torch.bfloat16]


def test_a_saved_network_loads_with_its_config_and_outputs(tmp_path: Path) -> None:
    network = network_with_effects()
    network.save_pretrained(tmp_path / "transformer")
    loaded = LaMambaDiff.from_pretrained(tmp_path, subfolder="transformer", low_cpu_mem_usage=False)
    assert loaded.architecture == TINY
    assert (loaded.config.sample_size, loaded.config.in_channels, loaded.config.out_channels) == (8, 4, 8)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in network.state_dict().items())
    # Not bit for bit: sums depend on where in memory a weight begins.
    assert relative_rms(loaded.eval()(*inputs()).sample, network(*inputs()).sample) < TOLERANCE[torch.float32]


def test_fields_that_contradict_or_are_unknown_are_refused() -> None:
    with pytest.raises(ValueError, match="out_channels: 3 given; 8 is accepted"):
        LaMambaDiff(out_channels=3)
    with pytest.raises(ValueError, match="n_heads: unknown field of the network; did you mean num_heads"):
        LaMambaDiff(n_heads=3)


def test_a_network_on_the_meta_device_has_shapes_and_no_memory() -> None:
    with torch.device("meta"):
        network = LaMambaDiff(**dataclasses.asdict(TINY))
        sample = network(torch.empty(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)).sample
    assert sample.is_meta
    assert sample.shape == (2, 8, 8, 8)


def test_forward_takes_a_number_as_timestep() -> None:
    network = network_with_effects()
    latents, _, labels = inputs()
    expected = network(latents, torch.full((3,), 7), labels).sample
    for timestep in (7, 7.0, torch.tensor(7)):
        assert torch.equal(network(latents, timestep, labels).sample, expected)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (4, 8, 8)], ids=str)
def test_forward_refuses_latents_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hidden_states: shape \(.*\) given; \(B, 4, H, W\) is accepted"):
        network_with_effects()(torch.zeros(shape), 7)
