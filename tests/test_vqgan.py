"""The VQGAN against Hugging Face's encoder, the released names and shapes, and the ways to learn a codebook."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from chameleon.errors import BadInput
from chameleon.tokenizers import quantizer as quantizer_module
from chameleon.tokenizers.quantizer import (
    CODEBOOKS,
    AdditiveCodebook,
    CodebookKind,
    IndexBackpropCodebook,
    LevelQuantizer,
    LinearCodebook,
    MovingAverageCodebook,
    PlainCodebook,
    build_quantizer,
    global_mean,
    nearest,
)
from chameleon.tokenizers.vq_loss import (
    BlurPool,
    PatchDiscriminator,
    ShiftTolerantLPIPS,
    adaptive_weight,
    hinge_discriminator_loss,
)
from chameleon.tokenizers.vqgan import VQGAN, VQGANConfig


def test_codes_equal_those_of_hugging_faces_encoder() -> None:
    torch.manual_seed(0)
    config = VQGANConfig(
        resolution=32,
        channels=32,
        multipliers=(1, 2),
        res_blocks=2,
        attention_resolutions=(16,),
        latent_channels=16,
        codebook_size=64,
        codebook_width=8,
    )
    ours = VQGAN(config).eval()
    torch.nn.init.normal_(ours.quantize.embedding.weight, std=0.5)
    theirs = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=8,
            num_embeddings=64,
            latent_channels=16,
            resolution=32,
            base_channels=32,
            channel_multiplier=[1, 2],
            num_res_blocks=2,
            attn_resolutions=[16],
        )
    ).eval()
    state = {name: value for name, value in ours.state_dict().items() if not name.startswith("decoder.")}
    assert set(theirs.state_dict()) == set(state)
    theirs.load_state_dict(state)
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(pictures)
        latent = ours.latent(pictures)
    torch.testing.assert_close(latent, theirs.quant_conv(expected.last_hidden_state), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.encode(pictures).flatten(), expected.image_tokens.flatten())
    assert len(ours.encode(pictures).unique()) > 5


def plain_vqgan(
    state: dict[str, Tensor], config: VQGANConfig
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Encoder (pictures to codes) and decoder (codes to pictures) read off the released weights, operation by operation."""

    def conv(x: Tensor, name: str, **how: int) -> Tensor:
        return F.conv2d(x, state[name + ".weight"], state[name + ".bias"], **how)

    def norm(x: Tensor, name: str) -> Tensor:
        groups = x.reshape(len(x), config.norm_groups, -1)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return groups.reshape(x.shape) * state[name + ".weight"][:, None, None] + state[name + ".bias"][:, None, None]

    def swish(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def block(x: Tensor, name: str) -> Tensor:
        h = conv(swish(norm(x, name + ".norm1")), name + ".conv1", padding=1)
        h = conv(swish(norm(h, name + ".norm2")), name + ".conv2", padding=1)
        return h + (conv(x, name + ".nin_shortcut") if name + ".nin_shortcut.weight" in state else x)

    def attention(x: Tensor, name: str) -> Tensor:
        h = norm(x, name + ".norm")
        q, k, v = (conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + conv((v @ weights.transpose(1, 2)).reshape(x.shape), name + ".proj_out")

    def middle(x: Tensor, name: str) -> Tensor:
        return block(attention(block(x, name + ".block_1"), name + ".attn_1"), name + ".block_2")

    def level(x: Tensor, name: str) -> Tensor:
        number = 0
        while f"{name}.block.{number}.conv1.weight" in state:
            x = block(x, f"{name}.block.{number}")
            if f"{name}.attn.{number}.q.weight" in state:
                x = attention(x, f"{name}.attn.{number}")
            number += 1
        return x

    def encode(x: Tensor) -> Tensor:
        x = conv(x, "encoder.conv_in", padding=1)
        for number in range(len(config.multipliers)):
            x = level(x, f"encoder.down.{number}")
            if number < len(config.multipliers) - 1:
                x = conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{number}.downsample.conv", stride=2)
        x = conv(swish(norm(middle(x, "encoder.mid"), "encoder.norm_out")), "encoder.conv_out", padding=1)
        latent = conv(x, "quant_conv").permute(0, 2, 3, 1)
        return (latent[..., None, :] - state["quantize.embedding.weight"]).pow(2).sum(-1).argmin(-1)

    def decode(codes: Tensor) -> Tensor:
        x = conv(state["quantize.embedding.weight"][codes].permute(0, 3, 1, 2), "post_quant_conv")
        x = middle(conv(x, "decoder.conv_in", padding=1), "decoder.mid")
        for number in reversed(range(len(config.multipliers))):
            x = level(x, f"decoder.up.{number}")
            if number:
                x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.up.{number}.upsample.conv", padding=1)
        return conv(swish(norm(x, "decoder.norm_out")), "decoder.conv_out", padding=1).clamp(-1, 1)

    return encode, decode


@pytest.mark.parametrize("attends", [(), (16,)])
def test_codes_and_pixels_equal_those_of_a_plain_reading(attends: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    config = VQGANConfig(
        resolution=32,
        channels=32,
        multipliers=(1, 2, 2),
        res_blocks=2,
        attention_resolutions=attends,
        latent_channels=16,
        codebook_size=64,
        codebook_width=8,
    )
    network = VQGAN(config).eval()
    torch.nn.init.normal_(network.quantize.embedding.weight, std=0.5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    encode, decode = plain_vqgan({name: value.detach() for name, value in network.released_state_dict().items()}, config)
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    codes = network.encode(pictures)
    assert torch.equal(codes, encode(pictures)) and len(codes.unique()) > 5
    decode_latent = network.decode(codes)
    torch.testing.assert_close(decode_latent, decode(codes), atol=1e-4, rtol=0)
    assert decode_latent.std() > 0.1


def test_released_configuration_has_the_released_shapes() -> None:
    with torch.device("meta"):
        network = VQGAN(VQGANConfig())
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert network.config.grid == (32, 32)
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.1.conv2.weight": (128, 128, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.downsample.conv.weight": (256, 256, 3, 3),
        "encoder.down.4.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "quant_conv.weight": (256, 256, 1, 1),
        "quantize.embedding.weight": (8192, 256),
        "post_quant_conv.bias": (256,),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.up.4.block.2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.2.norm2.weight": (128,),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert expected.items() <= shapes.items()
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert "encoder.down.4.downsample.conv.weight" not in shapes
    # Hugging Face's model has the same names for all but the decoder.
    with torch.device("meta"):
        theirs = ChameleonVQVAE(ChameleonVQVAEConfig())
    assert {n: s for n, s in shapes.items() if not n.startswith("decoder.")} == {
        name: tuple(value.shape) for name, value in theirs.state_dict().items()
    }


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(BadInput, match="not a multiple of 4"):
        VQGANConfig(resolution=30, multipliers=(1, 2, 2))
    with pytest.raises(BadInput, match="norm groups"):
        VQGANConfig(resolution=64, channels=24, multipliers=(1, 2))


def test_nearest_is_the_smallest_distance() -> None:
    torch.manual_seed(1)
    latent, codebook = torch.randn(200, 6), torch.randn(40, 6)
    assert torch.equal(nearest(latent, codebook), torch.cdist(latent, codebook).argmin(1))


def test_gradient_passes_straight_through() -> None:
    quantizer = PlainCodebook(16, 4)
    latent = torch.randn(2, 4, 3, 3, requires_grad=True)
    direction = torch.randn(2, 4, 3, 3)
    (quantizer(latent).latent * direction).sum().backward()
    torch.testing.assert_close(latent.grad, direction)


def test_plain_codebook_and_commitment_losses_pull_each_side_only() -> None:
    quantizer = PlainCodebook(16, 4, revive_below=0)
    latent = torch.randn(2, 4, 3, 3, requires_grad=True)
    result = quantizer(latent)
    result.codebook_loss.backward(retain_graph=True)
    assert latent.grad is None or not latent.grad.any()
    assert quantizer.embedding.weight.grad is not None and quantizer.embedding.weight.grad.any()
    quantizer.embedding.weight.grad = None
    result.commitment_loss.backward()
    assert latent.grad is not None and latent.grad.any()
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()


def test_moving_average_converges_to_cluster_means() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
    quantizer = MovingAverageCodebook(3, 2, decay=0.9, revive_below=0.0)
    quantizer.set_codes(torch.arange(3), centres + 0.5)
    for _ in range(200):
        points = centres[torch.randint(3, (300,))] + 0.1 * torch.randn(300, 2)
        quantizer(points.t().reshape(1, 2, 300, 1))
    torch.testing.assert_close(quantizer.codebook(), centres, atol=0.05, rtol=0)


def test_a_code_without_uses_stays_where_it_is() -> None:
    """Even after so many steps that the moving average of its uses is 0 in float32."""
    torch.manual_seed(0)
    quantizer = MovingAverageCodebook(2, 2, decay=0.5, revive_below=0.0)
    quantizer.set_codes(torch.arange(2), torch.tensor([[0.0, 0.0], [5.0, 5.0]]))
    for _ in range(200):
        quantizer(0.1 * torch.randn(1, 2, 8, 8))
    assert float(quantizer.uses[1]) == 0
    torch.testing.assert_close(quantizer.codebook()[1], torch.tensor([5.0, 5.0]))


@pytest.mark.parametrize("kind", ["plain", "moving_average"])
def test_dead_codes_come_back_to_life(kind: str) -> None:
    torch.manual_seed(0)
    quantizer = CODEBOOKS[kind](32, 2)  # type: ignore[index]
    assert isinstance(quantizer, PlainCodebook)
    quantizer.set_codes(torch.arange(32), torch.full((32, 2), 100.0))
    points = torch.randn(1, 2, 16, 16)
    for _ in range(20):
        codes = quantizer(points).codes
    assert len(codes.unique()) > 24


def test_linear_codebook_moves_all_codes_and_folds() -> None:
    quantizer = LinearCodebook(32, 4)
    before = quantizer.codebook().detach().clone()
    result = quantizer(torch.randn(1, 4, 2, 2))
    assert len(result.codes.unique()) <= 4
    result.codebook_loss.backward()
    with torch.no_grad():
        quantizer.projection.weight -= quantizer.projection.weight.grad
    moved = (quantizer.codebook() - before).abs().sum(1)
    assert (moved > 0).all()


QUANTIZED = VQGANConfig(
    resolution=16,
    channels=8,
    multipliers=(1, 2),
    res_blocks=1,
    latent_channels=8,
    codebook_size=16,
    codebook_width=4,
    norm_groups=4,
)


@pytest.mark.parametrize("kind", get_args(CodebookKind))
def test_every_codebook_is_saved_and_read_back(kind: CodebookKind) -> None:
    torch.manual_seed(0)
    for levels in ((4, 3, 2, 2), (2, 2, 2, 2)) if kind == "levels" else ((),):
        config = replace(QUANTIZED, levels=levels, codebook_size=math.prod(levels) or 16)
        trained = VQGAN(config, build_quantizer(kind, *config.codebook_shape))
        plain = VQGAN(config)
        assert set(trained.released_state_dict()) == set(plain.state_dict())
        plain.load_state_dict(trained.released_state_dict())
        pictures = torch.rand(2, 3, 16, 16) * 2 - 1
        codes = trained.eval().encode(pictures)
        assert torch.equal(plain.eval().encode(pictures), codes)
        # What the decoder sees in training is what it sees when codes are looked up.
        torch.testing.assert_close(trained.quantize(trained.latent(pictures)).latent, plain.quantize.lookup(codes))


def test_levels_and_kind_of_codebook_must_match() -> None:
    for kind, levels in (("levels", ()), ("plain", (4, 4))):
        config = replace(QUANTIZED, levels=levels, codebook_width=len(levels) or 4)
        with pytest.raises(BadInput, match="levels are for codebook=levels"):
            build_quantizer(kind, *config.codebook_shape)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="set codebook_size to 20"):
        replace(QUANTIZED, levels=(5, 4), codebook_width=2)
    with pytest.raises(BadInput, match="set codebook_width to 2"):
        replace(QUANTIZED, levels=(4, 4))


@pytest.mark.parametrize("levels", [(8, 5, 5), (3, 2), (2, 2, 2, 2, 2)])
def test_levels_count_all_combinations_and_round_to_the_nearest(levels: tuple[int, ...]) -> None:
    quantizer = LevelQuantizer(levels)
    codebook = quantizer.codebook()
    grids = [torch.linspace(-1, 1, count) for count in levels]
    scale = len(levels) ** -0.5 if set(levels) == {2} else 1.0
    torch.testing.assert_close(codebook, torch.cartesian_prod(*grids) * scale)
    latent = torch.randn(1, len(levels), 20, 30)
    result = quantizer(latent)
    bounded = torch.nn.functional.normalize(latent, dim=1) if scale < 1 else latent.tanh()
    flat = bounded.movedim(1, -1).flatten(0, 2)
    assert torch.equal(result.codes.flatten(), nearest(flat, codebook))
    assert torch.equal(result.latent, quantizer.lookup(result.codes))


def test_index_backpropagation_reaches_all_codes_and_keeps_the_nearest() -> None:
    torch.manual_seed(0)
    quantizer = IndexBackpropCodebook(16, 4)
    torch.nn.init.normal_(quantizer.embedding.weight)
    latent = torch.randn(1, 4, 3, 3)
    result = quantizer(latent)
    assert torch.equal(result.codes.flatten(), nearest(latent.movedim(1, -1).reshape(9, 4), quantizer.codebook()))
    torch.testing.assert_close(result.latent, quantizer.lookup(result.codes))
    (result.latent * torch.randn_like(latent)).sum().backward()
    assert quantizer.embedding.weight.grad is not None
    assert (quantizer.embedding.weight.grad.abs().sum(1) > 0).all()


def test_additive_codes_are_as_near_as_residual_quantisation() -> None:
    torch.manual_seed(0)
    latent = torch.randn(2000, 4)
    quantizer = AdditiveCodebook(64, 4)
    quantizer.init_from_latents(latent)
    coarse = quantizer.coarse[nearest(latent, quantizer.coarse)]
    residual = coarse + quantizer.fine[nearest(latent - coarse, quantizer.fine)]
    merged = quantizer.codebook()[nearest(latent, quantizer.codebook())]
    assert ((latent - merged).square().sum(1) <= (latent - residual).square().sum(1) + 1e-5).all()
    assert (latent - merged).square().sum(1).mean() < (latent - coarse).square().sum(1).mean() / 2


def test_entropy_term_prefers_certain_choices_and_equal_frequencies() -> None:
    quantizer = LevelQuantizer((2, 2))
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])

    def term(rows: torch.Tensor) -> float:
        return float(quantizer.quantize_rows(rows).codebook_loss)

    assert term(corners) < term(corners[:1].expand(4, 2))
    assert term(corners) < term(torch.tensor([[1.0, 0.01], [0.01, -1.0], [-1.0, 0.01], [0.01, 1.0]]))


def test_kmeans_start_lowers_the_distance() -> None:
    torch.manual_seed(0)
    latent = torch.randn(2000, 4)
    sampled, clustered = PlainCodebook(32, 4), PlainCodebook(32, 4)
    sampled.init_from_latents(latent, iterations=0)
    clustered.init_from_latents(latent, iterations=10)

    def distance(quantizer: PlainCodebook) -> float:
        return float(torch.cdist(latent, quantizer.codebook().detach()).min(1).values.square().mean())

    assert distance(clustered) < 0.85 * distance(sampled)


def test_hinge_loss_by_hand() -> None:
    real, decode_latent = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_discriminator_loss(real, decode_latent).item() == pytest.approx(0.5 * (0.25 + 0.5))


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    first, second = (3 * layer).sum(), (layer**2).sum()
    expected = (3 * 2**0.5) / (20**0.5 + 1e-4)
    assert adaptive_weight(first, second, layer).item() == pytest.approx(expected, rel=1e-5)


def test_discriminator_judges_patches() -> None:
    judge = PatchDiscriminator(16, 3)
    assert judge(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def test_blur_pool_keeps_constants_and_halves() -> None:
    blurred = BlurPool(5)(torch.full((1, 5, 9, 9), 0.7))
    torch.testing.assert_close(blurred, torch.full_like(blurred, 0.7))


def test_st_lpips_grows_with_noise() -> None:
    pytest.importorskip("stlpips_pytorch")
    network = ShiftTolerantLPIPS.pretrained()
    torch.manual_seed(0)
    picture = torch.rand(2, 3, 64, 64) * 2 - 1
    picture = torch.nn.functional.avg_pool2d(picture, 5, 1, 2)
    near, far = picture + 0.05 * torch.randn_like(picture), picture + 0.5 * torch.randn_like(picture)
    same, small, large = (network(picture, other) for other in (picture, near, far))
    assert same.abs().max() < 1e-6
    assert (small < large).all() and (small > 0).all()


def test_the_mean_over_processes_keeps_this_ones_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_module, "all_reduce_mean", lambda values: values.mul_(3))  # as if others had more
    values = torch.tensor([0.1, 0.2], requires_grad=True)
    mean = global_mean(values)
    torch.testing.assert_close(mean, torch.tensor([0.3, 0.6]))
    mean.square().sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.6, 1.2]))


def test_a_size_that_is_no_product_of_two_is_refused() -> None:
    with pytest.raises(BadInput, match="use a multiple of 8"):
        AdditiveCodebook(65, 4)
