"""Operations by the formula, and the bounds that chips set, against published counts."""

import pytest

from fvdm_jax import chips, costs
from fvdm_jax.models.dit import SIZES
from fvdm_jax.planning import published, roofline

P720, P480 = (21, 90, 160), (21, 60, 104)
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("name", "clip", "forward"),
    [("wan_14b", P720, 6523), ("wan_14b", P480, 1678), ("wan_1_3b", P720, 1250), ("wan_1_3b", P480, 283)],
)
def test_operations_of_a_pass(name, clip, forward):
    """In 10^12; the first, three times, is MaxDiffusion's own count of a training step within 0.02 %."""
    assert costs.forward(SIZES[name], clip) / 1e12 == pytest.approx(forward, abs=0.5)
    assert costs.training(SIZES[name], clip) == 3 * costs.forward(SIZES[name], clip)


def test_adapters_save_the_gradients_of_what_stands_still():
    products, attention = 1809.6e12, 4713.7e12
    found = costs.training(SIZES["wan_14b"], P720, adapters=1)
    assert found == pytest.approx(2 * products + 3 * attention, rel=1e-3)


def test_what_is_computed_again():
    config = SIZES["wan_14b"]
    layers, ends, among, prompt = costs.parts(config, P720)
    assert costs.again(config, P720, "none") == (0, 0)
    assert costs.again(config, P720, "full") == (layers, among + prompt)
    assert costs.again(config, P720, "attention") == (layers, prompt)
    assert sum(costs.again(config, P720, "full")) + ends == pytest.approx(costs.forward(config, P720))


def best(chip: str, train: bool, remat: str = "none", clip=P720, name: str = "wan_14b") -> float:
    """The share of the peak that a step can reach."""
    step = roofline.Step(SIZES[name], clip, ONE, train=train, remat=remat)
    of = chips.CHIPS[chip]
    return step.formula / (roofline.products(step) + roofline.attention(step, of) * of.peak)


@pytest.mark.parametrize(
    ("chip", "sampling", "nothing_again", "full"),
    [("v6e", 0.73, 0.67, 0.52), ("v7x", 0.73, 0.67, 0.52), ("v5p", 1.0, 0.89, 0.69)],
)
def test_the_share_of_the_peak_that_a_matrix_unit_allows(chip, sampling, nothing_again, full):
    """14B at 720p, by hand: products at the peak, attention by the products of its kernels."""
    assert best(chip, False) == pytest.approx(sampling, abs=0.005)
    assert best(chip, True) == pytest.approx(nothing_again, abs=0.005)
    assert best(chip, True, "full") == pytest.approx(full, abs=0.005)


def test_other_sizes_are_bound_alike():
    assert best("v6e", True, "none", P480) == pytest.approx(0.74, abs=0.005)
    assert best("v6e", False, "none", P480, "wan_1_3b") == pytest.approx(0.74, abs=0.005)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA GB200", 2500e12), ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12), ("cpu", None), ("NVIDIA T4", None),
    ],
)  # fmt: skip
def test_what_a_device_can_do(kind, peak):
    assert costs.peak(kind) == peak


@pytest.mark.parametrize(
    ("text", "count", "devices"),
    [
        ("v5p:4x4x4", 64, 64),
        ("v6e:16x16", 256, 256),
        ("TPU7x:2x2x1", 4, 8),
        ("gpu:h100x8", 8, 8),
        ("v5e:1x1", 1, 1),
    ],
)
def test_names_of_slices(text, count, devices):
    found = chips.parse(text)
    assert (found.chips, found.devices) == (count, devices)
    assert chips.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5p:4x4", "3 sides"), ("v5e:2x2x1", "2 sides"), ("v9:2x2", "names no TPU"), ("", "names no TPU"),
        ("h100x8", "names no TPU"), ("gpu:v5px8", "no number of GPUs"), ("gpu:h100", "no number of GPUs"),
        ("v6e:32x32", "at most 256"), ("v5e:0x2", "2 sides"), ("v5e:2x-2", "2 sides"),
        ("gpu:h100x0", "no number"),
    ],
)  # fmt: skip
def test_names_that_are_none(text, said):
    with pytest.raises(ValueError, match=said):
        chips.parse(text)


def test_published_measurements_are_of_the_nearest_kind():
    row = published.nearest("train", 5120, 75_600, "v5p")
    assert (row.chip, row.chips, row.task) == ("v5p", 4, "train")
    assert published.nearest("sample", 1536, 32_760, "v6e").chip == "v6e"
    assert published.nearest("sample", 1536, 32_760, "b200").chip in ("h100", "h200", "a100", "4090")
    assert published.nearest("encode", 5120, 75_600, "v5p") is None


def test_published_shares_are_by_our_count():
    """Seconds, chips and share of a row belong together, for a step of one clip."""
    row = next(row for row in published.TABLE if row.seconds == 36.01)
    work = costs.training(SIZES["wan_14b"], P720)
    assert work / (row.seconds * row.chips * chips.CHIPS[row.chip].peak) == pytest.approx(
        row.share, abs=0.001
    )
